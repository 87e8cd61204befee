"""What the comparison with the dense twin says about two curves."""

from typing import Any

import pytest

from demo.compare import _SCORED_CHARACTERS, _table, compared, validation_sample
from demo.corpus import Document
from demo.sources import KINDS


def run(arm: str, bits: list[float], seed: int = 0, seconds_per_point: float = 10.0) -> dict[str, Any]:
    """A run that was scored every thousand tokens."""
    curve = [
        {"tokens": 1000 * (number + 1), "cpu_s": seconds_per_point * (number + 1), "bits_per_byte": value}
        for number, value in enumerate(bits)
    ]
    return {"arm": arm, "seed": seed, "curve": curve}


def test_equal_tokens_are_the_last_that_both_reached() -> None:
    runs = [run("mixture", [3.0, 2.5]), run("dense", [3.1, 2.7, 2.4])]
    assert compared(runs, 0)["equal_tokens"] == {"tokens": 2000, "mixture": 2.5, "dense": 2.7}


def test_equal_tokens_are_the_same_count_when_neither_ends_on_a_round_one() -> None:
    """At the end of its budget a run is scored wherever it is; the other one was not scored there."""
    runs = [run("mixture", [3.0, 2.5]), run("dense", [3.1, 2.7, 2.4])]
    runs[0]["curve"].append({"tokens": 2300, "cpu_s": 23.0, "bits_per_byte": 2.45})
    runs[1]["curve"].append({"tokens": 3100, "cpu_s": 23.0, "bits_per_byte": 2.39})
    assert compared(runs, 0)["equal_tokens"] == {"tokens": 2000, "mixture": 2.5, "dense": 2.7}


def test_equal_time_is_the_end_of_each_run() -> None:
    runs = [run("mixture", [3.0, 2.5], seconds_per_point=15.0), run("dense", [3.1, 2.7, 2.4])]
    assert compared(runs, 0)["equal_time"] == {
        "mixture": {"tokens": 2000, "cpu_s": 30.0, "bits_per_byte": 2.5},
        "dense": {"tokens": 3000, "cpu_s": 30.0, "bits_per_byte": 2.4},
    }


def test_a_pair_is_of_one_seed() -> None:
    runs = [
        run(arm, bits, seed) for seed in (0, 1) for arm, bits in (("dense", [4.0 + seed]), ("mixture", [3.0 + seed]))
    ]
    assert compared(runs, 1)["equal_tokens"] == {"tokens": 1000, "mixture": 4.0, "dense": 5.0}
    assert compared(runs, 1)["seed"] == 1


def test_the_table_has_a_row_per_seed() -> None:
    runs = [run(arm, [3.0, 2.5], seed) for seed in (0, 1) for arm in ("mixture", "dense")]
    rows = _table([compared(runs, seed) for seed in (0, 1)]).splitlines()[2:]
    assert rows[1] == "| 1 | 0.0 M | 2.500 | 2.500 | 2.500 (0.0 M) | 2.500 (0.0 M) |"
    assert len(rows) == 2


@pytest.mark.parametrize("length", [_SCORED_CHARACTERS, 10], ids=["much text", "little text"])
def test_the_sample_has_as_much_of_each_kind(length: int) -> None:
    documents = [Document("p", kind, f"{kind} {i}", kind[0] * length) for kind in KINDS for i in range(2)]
    sample = validation_sample(documents)
    assert [text[0] for text in sample] == [kind[0] for kind in KINDS]
    assert {len(text) for text in sample} == {min(2 * length + 2, _SCORED_CHARACTERS)}

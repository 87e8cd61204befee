"""The evaluation's parts, and all of it on a tiny model."""

import json
import subprocess
from pathlib import Path

import pytest

import demo.answers
import demo.evaluate
from checkpoint.config import read_config
from demo.evaluate import _tables, evaluate, xz_bits_per_byte
from demo.glossary import Entry
from demo.sources import KINDS
from tests.demo.exported import export_tiny, write_corpus
from tests.demo.tiny import NO_PROGRESS, ROOMY

TEXTS = ["It is a truth universally acknowledged. " * 20, "größer\n" * 5, "end"]
# What `xz -9e` (5.4.1) makes of them, joined.
XZ_BYTES = 132


def test_xz_gets_the_texts_in_one_piece() -> None:
    joined = "\n\n".join(TEXTS).encode()
    assert xz_bits_per_byte(TEXTS) == 8 * XZ_BYTES / len(joined)


def test_xz_is_the_program() -> None:
    data = "\n\n".join(TEXTS).encode()
    try:
        packed = subprocess.run(["xz", "-9e", "--threads=1", "--stdout"], input=data, capture_output=True, check=True)
    except FileNotFoundError:
        pytest.skip("no xz on this machine")
    assert xz_bits_per_byte(TEXTS) == pytest.approx(8 * len(packed.stdout) / len(data), rel=0.01)


def test_an_evaluation_is_json_and_adds_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [Entry(f"term {number}", "A definition.") for number in range(12)]
    monkeypatch.setattr(demo.answers, "_LONGEST_ANSWER", 2)
    monkeypatch.setattr(demo.evaluate, "_LONG_WINDOW", 64)
    for module in (demo.answers, demo.evaluate):
        monkeypatch.setattr(module, "read_glossary", lambda: entries)
    export_tiny(tmp_path, monkeypatch)
    results, scores = evaluate(tmp_path / "checkpoint", write_corpus(tmp_path / "corpus"), NO_PROGRESS)

    assert json.loads(json.dumps(results)) == results
    assert list(scores) == [*KINDS, "chat"]
    sizes = results["validation_bytes"]
    assert sizes["all"] == sum(sizes[kind] for kind in KINDS)
    mean = sum(results["bits_per_byte"][kind] * sizes[kind] for kind in KINDS) / sizes["all"]
    assert results["bits_per_byte"]["all"] == pytest.approx(mean, abs=1e-3)
    assert (results["glossary"]["entries"], results["glossary"]["exact"]) == (12, 0)
    assert results["unknown_words"]["asked"] == 15, "of the 20 validation nouns, those that training did not have"
    moe_layers = len(read_config(tmp_path / "checkpoint").moe_layers)
    assert {len(row) for row in results["load_skew"].values()} == {moe_layers}
    assert all(1 <= skew <= ROOMY.num_local_experts for row in results["load_skew"].values() for skew in row)
    assert set(results["long_window"]) == {"512", "64"}
    assert f"| all | {sizes['all']:,} |" in _tables(results)

"""A traffic step onto few experts: what is asked, and what is made of what comes."""

import doctest
from types import SimpleNamespace

import pytest

from bench import hot_step, hot_tokens
from bench.hot_step import END_S, FROM_S, UNTIL_S, Asked
from cluster.simulation.scenario import parse_scenario


def test_examples_of_the_docstrings() -> None:
    assert doctest.testmod(hot_tokens).failed == 0


def test_a_row_tells_of_its_second() -> None:
    tokens = [(0.5, None), (1.2, 700.0), (1.3, 100.0)]
    shards = [(0.0, [0.0, 0.0]), (2.0, [60.0, 20.0]), (END_S, [60.0, 20.0])]
    rows = hot_step.series(tokens, shards)
    assert [row["tok_s"] for row in rows[:3]] == [1, 2, 0]
    assert (rows[0]["gap_ms_p50"], rows[1]["gap_ms_p50"]) == (None, 400.0)
    assert rows[0]["imbalance"] == pytest.approx(1.5)
    assert rows[5]["imbalance"] is None


def test_only_the_lasting_streams_count() -> None:
    asked = [Asked(0.0, (1,), 3, 0, None), Asked(0.0, (1,), 2, 0, 1), Asked(0.0, (1,), 3, 0, None)]
    streams = [SimpleNamespace(token_s=token_s) for token_s in ([1.0, 1.5], [1.0, 1.1], [])]
    assert hot_step.tokens_of(asked, streams) == [(1.0, None), (1.5, 500.0)]


def test_facts_are_those_of_the_windows() -> None:
    def value(second: int) -> float:
        return 3.0 if FROM_S < second <= FROM_S + 8 else 1.0

    rows = [{"time_s": s, "imbalance": value(s), "gap_ms_p99": 10 * value(s)} for s in range(1, int(END_S) + 1)]
    found = hot_step.facts({"series": rows, "decisions": [{"time_s": 3.0}, {"time_s": FROM_S + 4.2}]})
    assert found["decided_after_s"] == 4.2
    assert (found["imbalance_before"], found["imbalance_hit"], found["imbalance_recovered"]) == (1.0, 3.0, 1.0)
    assert (found["gap_ms_p99_hit"], found["gap_ms_p99_after"]) == (30.0, 10.0)
    quiet = hot_step.facts({"series": rows, "decisions": [{"time_s": UNTIL_S + 1}]})
    assert quiet["decided_after_s"] is None


def test_its_windows_are_valid_ones() -> None:
    parse_scenario({"autoscale": hot_step.AUTOSCALE, "shards": {"count": hot_step.SHARDS, "slots": hot_step.SLOTS}})

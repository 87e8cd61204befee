"""From the times of tokens to rows: gaps, losses, who answers for what, and the fields of the file."""

from pathlib import Path

import pytest

from bench.chaos.asks import asks
from bench.chaos.bench import is_good
from bench.chaos.gaps import changed_tokens, first_change, gap_figures, longest_gap_s, throughput_lost, tokens_per_s
from bench.chaos.load import hung
from bench.chaos.records import Stream
from bench.chaos.reference import first_wrong
from bench.chaos.results import (
    FIELDS,
    NO_COPY,
    UNCOVERED,
    Happened,
    ModeRun,
    changed_exactly,
    expected_reasons,
    read,
    replaced,
    rows,
    windows_end,
    with_rows_kept,
)
from bench.chaos.table import HEADS, cells, markdown
from bench.errors import BenchError

ISSUE = ["mode", "target", "faults", "requests_failed", "tokens_changed", "gap_ms_p50", "gap_ms_p99", "gap_ms_max",
         "throughput_lost", "recovered_by", "recovered_s", "expected"]  # fmt: skip


def stream(*times: float, ended_s: float | None = None, error: str | None = None, ask: int = 0) -> Stream:
    """One token each, whose id is its place."""
    pieces = [(at_s, 0, [place]) for place, at_s in enumerate(times)]
    return Stream(ask, times[0] - 0.1 if times else 0.0, pieces, ended_s, error)


def happened(at_s: float, target: str = "shard", **more: object) -> Happened:
    given = {"evidence": {"shard_down": 1.0}, "recovered_s": at_s + 2, "until_s": at_s + 5} | more
    return Happened("crash", target, "random", ["shard-1"], at_s, 8, **given)  # type: ignore[arg-type]


def test_the_longest_gap_is_the_one_that_the_interval_meets() -> None:
    assert longest_gap_s(stream(1, 2, 7, 8), 3, 9) == 5
    assert longest_gap_s(stream(1, 2, 7, 8), 3, 5) == 3  # the next fault's from then on
    assert longest_gap_s(stream(1, 2, 7, 8), 7.5, 9) == 1
    assert longest_gap_s(stream(1, 2, 3, 13), 1, 2.5) == 1


def test_a_stream_that_was_not_there_has_no_gap() -> None:
    assert longest_gap_s(stream(4, 5), 3, 6) is None
    assert longest_gap_s(stream(1, 2, ended_s=2.1), 3, 5) is None
    assert longest_gap_s(stream(), 3, 5) is None


def test_a_failed_stream_stood_still_until_it_failed() -> None:
    assert longest_gap_s(stream(1, 2, ended_s=6, error="UNAVAILABLE: gone"), 3, 8) == 4


def test_gap_figures_are_milliseconds() -> None:
    assert gap_figures([0.1, 0.2, 0.3]) == {"gap_ms_p50": 200.0, "gap_ms_p99": 298.0, "gap_ms_max": 300.0}
    assert set(gap_figures([]).values()) == {None}


def test_what_is_lost_is_a_share_of_a_minutes_tokens() -> None:
    steady = [stream(*(n / 10 for n in range(1000)))]
    assert throughput_lost(steady, 10.0, 20, 80) == pytest.approx(0, abs=0.01)
    stopped = [stream(*(n / 10 for n in range(1000) if not 200 <= n < 230))]
    assert throughput_lost(stopped, 10.0, 20, 80) == pytest.approx(0.05, abs=0.01)
    assert throughput_lost(stopped, 10.0, 20, 30) == pytest.approx(0.05, abs=0.01)
    assert throughput_lost(steady, 9.0, 20, 80) == 0.0


def test_the_speed_over_time() -> None:
    assert tokens_per_s([stream(0.1, 0.2, 0.6, 1.7)], 0, 2, 0.5) == [(0.25, 4.0), (0.75, 2.0), (1.25, 0.0), (1.75, 2.0)]


def test_a_token_that_is_another_a_lacking_and_a_spare_one_are_changes() -> None:
    good = stream(1, 2, 3, ended_s=3.1)
    assert first_change(good, {0: [0, 1, 2]}) is None
    assert (first_change(good, {0: [0, 9, 2]}), changed_tokens(good, {0: [0, 9, 2]})) == (2, 1)
    assert (first_change(good, {0: [0, 1]}), changed_tokens(good, {0: [0, 1]})) == (3, 1)
    assert (first_change(good, {0: [0, 1, 2, 3]}), changed_tokens(good, {0: [0, 1, 2, 3]})) == (3.1, 1)


def test_a_failed_stream_need_not_be_complete_but_must_be_right() -> None:
    failed = stream(1, 2, ended_s=2.5, error="UNAVAILABLE: gone")
    assert changed_exactly([failed], [{0: [0, 1, 2, 3]}]) == {}
    assert changed_exactly([failed], [{0: [0, 7, 2, 3]}]) == {0: (2, 1)}


def test_in_bf16_a_finished_stream_that_lacks_tokens_is_changed() -> None:
    finished, failed = stream(1, 2, 3, ended_s=3.5), stream(1, 2, ended_s=3.5, error="UNAVAILABLE: gone")
    assert first_wrong(finished, [[]], 3) is None
    assert first_wrong(finished, [[]], 5) == (3.5, 2)
    assert first_wrong(finished, [[1, 2]], 3) == (2, 2)
    assert first_wrong(stream(ended_s=3.5), [], 4) == (3.5, 4)
    assert first_wrong(failed, [[]], 5) is None


def test_an_answer_that_came_twice_is_changed() -> None:
    twice = Stream(0, 0.0, [(1, 0, [5, 6]), (2, 0, [5, 6])], ended_s=2.1)
    assert changed_exactly([twice], [{0: [5, 6]}]) == {0: (2, 2)}


def test_a_row_has_the_fields_that_are_promised_in_that_order() -> None:
    [row] = rows(ModeRun([happened(10)], [stream(9, 10, 11)], 1.0, {}), {})
    assert list(row) == list(FIELDS) == ISSUE
    assert len(cells(row)) == len(HEADS)
    assert len(markdown([row])) == 3


def test_a_loss_belongs_to_the_last_fault_before_it() -> None:
    faults = [happened(10, "shard"), happened(20, "router"), happened(30, "shard")]
    streams = [
        stream(9, 12, ended_s=12, error="UNAVAILABLE: a"),
        stream(9, 25, ended_s=25, error="UNAVAILABLE: b"),
        stream(9, 31, ended_s=31, error="UNAVAILABLE: c"),
        stream(9, 11, 22),
    ]
    shard, router = rows(ModeRun(faults, streams, 1.0, {3: (22, 5)}), {})
    assert (shard["target"], shard["requests_failed"], shard["tokens_changed"]) == ("shard", 2, 0)
    assert (router["target"], router["requests_failed"], router["tokens_changed"]) == ("router", 1, 5)


@pytest.mark.parametrize(("target", "failed"), [("shard", 2), ("router", 2), ("frontend", 0), ("haproxy", 0)])
def test_a_stream_that_broke_has_failed_unless_the_fault_may_break_connections(target: str, failed: int) -> None:
    resumed = stream(9, 11, 12)
    resumed.resumed_s = [11.0, 12.0]
    [row] = rows(ModeRun([happened(10, target)], [resumed], 1.0, {}), {})
    assert row["requests_failed"] == failed


def test_a_fault_counts_only_if_something_rose() -> None:
    [row] = rows(ModeRun([happened(10), happened(20, evidence={})], [], 1.0, {}), {})
    assert (row["faults"], row["recovered_by"]) == (1, "shard_down")


def test_a_row_that_did_not_recover_says_so() -> None:
    [row] = rows(ModeRun([happened(10), happened(20, recovered_s=None)], [], 1.0, {}), {})
    assert row["recovered_s"] is None
    assert cells(row)[8] == "never"


def test_windows_end_with_the_next_fault() -> None:
    faults = [happened(10), happened(20)]
    windows_end(faults, 26)
    assert [fault.until_s for fault in faults] == [20, 26]


def test_losses_are_good_only_where_a_reason_is_given() -> None:
    [row] = rows(ModeRun([happened(10)], [], 1.0, {}), {})
    fault = {"counts": True, "restarted": False}
    found = {"rows": [row], "leaks": [], "left_out": [], "faults": [fault]}
    assert is_good(found)
    assert is_good(found | {"rows": [row | {"requests_failed": 1, "expected": NO_COPY}]})
    assert is_good(found | {"left_out": [{"mode": "drop", "target": "all", "why": "needs root"}]})
    for bad in (
        {"rows": []},
        {"rows": [row | {"requests_failed": 1}]},
        {"rows": [row | {"requests_failed": 1, "expected": UNCOVERED}]},
        {"rows": [row | {"tokens_changed": 3}]},
        {"rows": [row | {"recovered_s": None}]},
        {"leaks": ["threads"]},
        {"left_out": [{"mode": "crash", "target": "controller", "why": "it does not run"}]},
        {"faults": [fault, fault | {"counts": False}]},
        {"faults": [fault | {"restarted": True}]},
    ):
        assert not is_good(found | bad), bad


def test_what_the_bench_does_itself_is_no_recovery() -> None:
    harmed = {"evidence": {}, "harm": {"node ended": 1.0}}
    for mode, target, counts in (("node-loss", "node", False), ("drop", "shard", True), ("head-loss", "gcs", True)):
        fault = Happened(mode, target, "random", ["host 1"], 1.0, 8, **harmed)  # type: ignore[arg-type]
        assert fault.counts is counts
    assert not Happened("drop", "shard", "random", ["host 1"], 1.0, 8).counts


def test_a_stream_that_hangs_has_failed_and_its_gap_has_no_end() -> None:
    hanging = stream(1, 2, 3)
    assert longest_gap_s(hanging, 3.5, 60) == 57
    failed = hung(hanging, 200.0, 180.0)
    assert (failed.ended_s, failed.error) == (200.0, "HUNG: no end within 180 s after the last request was sent")
    assert hanging.error is None  # its thread still has it
    never = hung(Stream(0, 1.0), 200.0, 180.0)
    [row] = rows(ModeRun([happened(3.5, until_s=60.0)], [failed, never], 1.0, {}), {})
    assert (row["requests_failed"], row["gap_ms_max"]) == (2, 57_000.0)
    ended = stream(1, 2, ended_s=2.5)
    assert hung(ended, 200.0, 180.0) is ended


def test_a_run_keeps_the_rows_of_others_of_the_same_deployment() -> None:
    entries = [{"mode": "crash", "target": target} for target in ("shard", "router")]
    lists = dict.fromkeys(("rows", "faults", "left_out"), entries)
    lines = [{"mode": "crash", "faults": [(target, 1.0)]} for target in ("shard", "router")]
    old = {"model": "m", "dtype": "float32", "shape": {"shards": 5}, "timelines": lines, **lists}
    added = {"mode": "crash", "target": "shard", "is_new": True}
    new = {**old, **{key: [added] for key in lists}, "timelines": [], "seed": 7}
    kept = with_rows_kept(old, new, {("crash", "shard")})
    assert kept["rows"] == kept["faults"] == [entries[1], added]
    assert (kept["timelines"], kept["seed"]) == ([lines[1]], 7)


def test_the_file_has_one_run_for_each_deployment() -> None:
    lists: dict[str, list[object]] = {key: [] for key in ("rows", "faults", "left_out", "timelines")}
    runs = [{"model": "m", "dtype": dtype, "shape": {"shards": 5}, **lists} for dtype in ("float32", "bfloat16")]
    again = {**runs[0], "seed": 7}
    assert replaced(runs, again, set()) == [again, runs[1]]
    other = {**runs[0], "shape": {"shards": 3}}
    assert replaced(runs, other, set()) == [*runs, other]


@pytest.mark.parametrize("content", [None, "", "[]", '{"runs": []}', '{"runs": 3}'])
def test_a_file_that_holds_no_results_says_what_would_help(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "chaos.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(BenchError, match=r"chaos\.json (does not exist|cannot be read|holds no results)"):
        read(file)


def test_reasons_are_given_only_where_there_is_no_copy() -> None:
    many, single = expected_reasons(2, 2, 2), expected_reasons(1, 1, 1)
    assert ("crash", "router") not in many
    assert ("corrupt-slice", "shard") not in many
    assert {("crash", "router"), ("crash", "frontend"), ("corrupt-slice", "shard")} <= set(single)
    assert ("corrupt-slice", "replicas") in many
    covered, uncovered = [rows(ModeRun([happened(10, uncovered=n)], [], 1.0, {}), many)[0] for n in (0, 3)]
    assert not covered["expected"]
    assert "no other copy" in uncovered["expected"]


def test_asks_are_the_same_for_a_seed_and_greedy_where_only_logits_judge() -> None:
    assert asks(1, 12, 4096, greedy_only=False) == asks(1, 12, 4096, greedy_only=False)
    assert asks(1, 12, 4096, greedy_only=False) != asks(2, 12, 4096, greedy_only=False)
    assert all(ask.is_greedy for ask in asks(1, 12, 4096, greedy_only=True))
    kinds = [ask.is_greedy for ask in asks(1, 10, 4096, greedy_only=False)]
    assert kinds == [True, False, False, False, False] * 2

"""The result of a simulation as tables on a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

MOST_ROWS = 24


def tables(result: Mapping[str, Any]) -> list[Table | Text]:
    """How it went over time, what was decided, and the whole run in a line."""
    shown: list[Table | Text] = [_series(result["series"])]
    decisions = [row for row in result.get("decisions", ()) if row["decision"] != "hold"]
    if decisions:
        shown.append(_decisions(decisions))
    return [*shown, Text(_summary(result["summary"], result["scenario"]["duration_s"]))]


def _series(series: Sequence[Mapping[str, Any]]) -> Table:
    """At most MOST_ROWS of the rows; each tells about the time since the row before it in the result.

    running: requests that run, and after a + those that wait.
    """
    names = ("time", "tok/s", "gap p50", "p99 ms", "max/mean", "copies", "shards", "running", "moved")
    table = Table(*names, box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
    step = -(-len(series) // MOST_ROWS)
    for row in series[step - 1 :: step]:
        table.add_row(
            f"{row['time_s']:g} s",
            f"{row['tok_s']:.0f}",
            _number(row["gap_ms_p50"]),
            _number(row["gap_ms_p99"]),
            _number(row["imbalance"], 2),
            f"{row['copies']:.2f}",
            str(row["shards"]),
            f"{row['running']}+{row['waiting']}" if row["waiting"] else str(row["running"]),
            size(row["moved_bytes"]),
        )
    return table


def _decisions(decisions: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("time", "of", "decision", "because", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for row in decisions:
        table.add_row(f"{row['time_s']:.1f} s", row["kind"], row["decision"], Text(row["reason"]))
    return table


def _summary(summary: Mapping[str, Any], seconds: float) -> str:
    return (
        f"{summary['tokens']:,} tokens in {seconds:g} s: {summary['tok_s']:.1f} tok/s, "
        f"gaps p50 {_number(summary['gap_ms_p50'])} ms, p99 {_number(summary['gap_ms_p99'])} ms, "
        f"first token p50 {_number(summary['first_ms_p50'])} ms; max/mean {_number(summary['imbalance'], 2)}; "
        f"{size(summary['moved_bytes'])} moved. "
        f"{summary['requests']} requests: {summary['finished']} finished, {summary['refused']} refused, "
        f"{summary['under_way']} under way."
    )


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def size(count: int) -> str:
    """Bytes, for reading."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"

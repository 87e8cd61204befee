"""The fault bench's rows for reading, on the terminal and as Markdown for docs/chaos.md."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

HEADS = (
    "mode",
    "target",
    "faults",
    "requests\nfailed",
    "tokens\nchanged",
    "longest gap, ms\np50 / p99 / max",
    "throughput\nlost",
    "recovered by",
    "after s\n(worst)",
    "expected",
)


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row's texts, in the order of HEADS."""
    gaps = [row[f"gap_ms_{name}"] for name in ("p50", "p99", "max")]
    return [
        row["mode"],
        row["target"],
        str(row["faults"]),
        str(row["requests_failed"]),
        str(row["tokens_changed"]),
        " / ".join("-" if gap is None else f"{gap:.0f}" for gap in gaps),
        f"{row['throughput_lost']:.1%}",
        row["recovered_by"] or "nothing rose",
        "never" if row["recovered_s"] is None else f"{row['recovered_s']:.1f}",
        row["expected"],
    ]


def show(found: Mapping[str, Any], console: Console) -> None:
    """Print the rows, what was left out, and leaks."""
    table = Table(title=found["title"], title_justify="left")
    for head in HEADS:
        table.add_column(head, justify="right" if head not in ("mode", "target", HEADS[7], HEADS[9]) else "left")
    for row in found["rows"]:
        table.add_row(*cells(row))
    console.print(table)
    for left_out in found["left_out"]:
        console.print(f"left out: {left_out['mode']} of {left_out['target']}: {left_out['why']}")
    for leak in found.get("leaks", []):
        console.print(f"leak: {leak}")


def markdown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The same as lines of a Markdown table."""
    heads = [head.replace("\n", " ") for head in HEADS]
    return [_line(heads), _line(["---"] * len(heads)), *(_line(cells(row)) for row in rows)]


def _line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"

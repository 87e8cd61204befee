"""The README's table of what dies, made of bench/chaos.json.

python -m bench.chaos.readme [CHAOS.json]     # prints it as Markdown
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from bench.chaos.results import read
from checkpoint.errors import DroverError

MANY, SINGLE = "many", "single"
"""Deployments of the embedded model in fp32: two of everything, or one."""
HEAD = ("what fails", "times", "longest pause, s", "requests failed", "tokens changed", "then")


class Line(NamedTuple):
    """label, then: for the reader. of: which deployment. rows: (mode, target), the first that was measured counts."""

    label: str
    of: str
    mode: str
    target: str
    then: str


LINES = (
    Line("shard, killed", MANY, "crash", "shard", "the same step goes on at replicas"),
    Line("all shards with an expert, killed", MANY, "crash", "replicas", "steps wait for a restarted shard"),
    Line("shard without replica, killed", SINGLE, "crash", "shard", "steps wait for the restarted shard"),
    Line("shard, frozen 3 s", MANY, "stop", "shard", "replicas are asked, too"),
    Line("shard, 100 times as slow", MANY, "slow", "shard", "replicas are asked, too; then it gets fewer rows"),
    Line("host of shards, cannot receive 5 s", MANY, "blackhole-recv", "shard", "replicas are asked, too"),
    Line("host of shards, lost", MANY, "node-loss", "node", "replicas; Ray starts its shards elsewhere"),
    Line("router, killed", MANY, "crash", "router", "another router computes its requests again"),
    Line("the only router, killed", SINGLE, "crash", "router", "requests wait for it, and are computed again"),
    Line("frontend replica, killed", MANY, "crash", "frontend", "clients resume at another"),
    Line("HAProxy, killed", MANY, "crash", "haproxy", "clients resume once it is back"),
    Line("controller, killed", MANY, "crash", "controller", "Ray restarts it"),
    Line("Ray's head, killed for 3 s", MANY, "head-loss", "gcs", "streams go on"),
)


def lines(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table, of what was measured."""
    body = [cells for line in LINES if (cells := _cells(line, runs)) is not None]
    return [_markdown(HEAD), _markdown(("---",) * len(HEAD)), *map(_markdown, body)]


def deployments(runs: Sequence[Mapping[str, Any]], of: str) -> list[Mapping[str, Any]]:
    """The runs of the embedded model in fp32 that have many of everything, or a single one."""
    found = []
    for run in runs:
        shape = run["shape"]
        is_many = shape["replicas"] > 1 and shape["routers"] > 1 and shape["frontends"] > 1
        is_single = shape["replicas"] == shape["routers"] == shape["frontends"] == 1
        if run["dtype"] == "float32" and run["model"] == "drover-demo" and (is_many if of == MANY else is_single):
            found.append(run)
    return found


def _cells(line: Line, runs: Sequence[Mapping[str, Any]]) -> tuple[str, ...] | None:
    """Of the first deployment in which it was measured."""
    here = (line.mode, line.target)
    for run in deployments(runs, line.of):
        row = next((row for row in run["rows"] if (row["mode"], row["target"]) == here), None)
        pauses = [
            fault["gap_ms_max"] / 1e3
            for fault in run["faults"]
            if (fault["mode"], fault["target"]) == here and fault["gap_ms_max"] is not None
        ]
        if row is not None and row["faults"] and pauses:
            pause = f"{median(pauses):.2f} / {max(pauses):.2f}"
            return (
                line.label, str(len(pauses)), pause, str(row["requests_failed"]), str(row["tokens_changed"]), line.then,
            )  # fmt: skip
    return None


def _markdown(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "chaos.json"
    try:
        print("\n".join(lines(read(file))))
    except DroverError as error:
        print(f"bench.chaos.readme: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

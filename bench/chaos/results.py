"""bench/chaos.json: what it holds, and how rows are made of faults and streams."""

import json
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.chaos.asks import Ask
from bench.chaos.gaps import changed_tokens, first_change, gap_figures, longest_gap_s, throughput_lost
from bench.chaos.records import Stream
from bench.chaos.schedule import SHARD_TARGETS
from bench.errors import BenchError

NO_COPY = "no healthy copy: requests fail if it lasts longer than heal_s"
"""The only reason for which requests may fail. Others explain a pause."""
UNCOVERED = "no other copy of some experts: streams wait until a shard of theirs is back"
HARMLESS = {
    ("disk-full", "logs"): "nothing has to recover: logs are lost, streams go on",
    ("head-loss", "gcs"): "nothing has to recover: no token passes Ray's head",
    **{
        ("resize", target): "one copy: streams wait until a killed shard is back; else nothing has to recover"
        for target in ("shards", "routers")
    },
    **{("delay", target): "TCP waits; nothing else has to recover" for target in SHARD_TARGETS},
    **{("drop", target): "TCP sends again; nothing else has to recover" for target in SHARD_TARGETS},
}
"""(mode, target) that may leave no counter risen. Their faults count if there is proof of the harm."""
MAY_BREAK = ("frontend", "haproxy", "node", "raylet", "any")
"""Targets whose faults may break clients' connections, which clients resume. "any" may be one of them."""
MOST_CHANGES = 20
FIELDS = (
    "mode",
    "target",
    "faults",
    "requests_failed",
    "tokens_changed",
    "gap_ms_p50",
    "gap_ms_p99",
    "gap_ms_max",
    "throughput_lost",
    "recovered_by",
    "recovered_s",
    "expected",
)


@dataclass
class Happened:
    """A fault as it was: times by time.monotonic.

    point: where it struck. victims: names. healed_s: when the bench took it away; None where there
    is nothing to take away. recovered_s: when every part was back and every stream had a token;
    None if that did not happen in time. evidence: what rose because the system recovered, by name.
    harm: proof that the fault was there, such as lost packets. until_s: the end of its window.
    uncovered: experts that had no living shard meanwhile. restarted: all had ended, and the bench
    has started it again.
    """

    mode: str
    target: str
    point: str
    victims: list[str]
    at_s: float
    active: int
    healed_s: float | None = None
    recovered_s: float | None = None
    until_s: float = 0.0
    uncovered: int = 0
    evidence: dict[str, float] = field(default_factory=dict)
    harm: dict[str, float] = field(default_factory=dict)
    restarted: bool = False
    note: str = ""

    @property
    def counts(self) -> bool:
        """Only a fault that something has recovered from shows anything, or one that nothing has to recover from."""
        return bool(self.evidence) or ((self.mode, self.target) in HARMLESS and bool(self.harm))


@dataclass(frozen=True)
class ModeRun:
    """One mode: its faults, the streams beside them, and the speed before the first of them.

    failed, changed: by stream, when it failed, and when its first wrong token came with how many
    tokens are wrong.
    """

    faults: Sequence[Happened]
    streams: Sequence[Stream]
    rate_tok_s: float
    changed: Mapping[int, tuple[float, int]]


def changed_exactly(
    streams: Sequence[Stream], expected: Sequence[Mapping[int, Sequence[int]]]
) -> dict[int, tuple[float, int]]:
    """Streams with tokens that are not the one process's: (when the first came, how many). expected: by request."""
    found = {}
    for number, stream in enumerate(streams):
        at_s = first_change(stream, expected[stream.ask])
        if at_s is not None:
            found[number] = (at_s, changed_tokens(stream, expected[stream.ask]))
    return found


def rows(run: ModeRun, expected: Mapping[tuple[str, str], str]) -> list[dict[str, Any]]:
    """One row per (mode, target), in the order in which they came. expected: reasons for losses, by row.

    A stream that failed, broke or changed belongs to the last fault before that moment. A stream that
    broke has failed for most clients, although the load's own resumes it. Where a fault may break
    connections, resuming is the recovery; elsewhere no stream may break.
    """
    failed = _blame(run.faults, [s.ended_s or s.sent_s for s in run.streams if s.error is not None])
    broken = _blame(run.faults, [at_s for stream in run.streams for at_s in stream.resumed_s])
    blamed_failed = [
        count + (0 if fault.target in MAY_BREAK else breaks)
        for fault, count, breaks in zip(run.faults, failed, broken, strict=True)
    ]
    blamed_changed = _blame(
        run.faults, [at_s for at_s, _ in run.changed.values()], [n for _, n in run.changed.values()]
    )
    made = []
    for mode, target in dict.fromkeys((fault.mode, fault.target) for fault in run.faults):
        mine = [i for i, fault in enumerate(run.faults) if (fault.mode, fault.target) == (mode, target)]
        faults = [run.faults[i] for i in mine]
        gaps = [gap for fault in faults for s in run.streams if (gap := longest_gap_s(s, fault.at_s, fault.until_s))]
        lost = [throughput_lost(run.streams, run.rate_tok_s, fault.at_s, fault.until_s) for fault in faults]
        recovered = [fault.recovered_s - fault.at_s for fault in faults if fault.recovered_s is not None]
        row = {
            "mode": mode,
            "target": target,
            "faults": sum(fault.counts for fault in faults),
            "requests_failed": sum(blamed_failed[i] for i in mine),
            "tokens_changed": sum(blamed_changed[i] for i in mine),
            **gap_figures(gaps),
            "throughput_lost": round(fmean(lost), 4),
            "recovered_by": ", ".join(sorted({name for fault in faults for name in fault.evidence})),
            "recovered_s": round(max(recovered), 2) if len(recovered) == len(faults) else None,
            "expected": expected.get((mode, target))
            or HARMLESS.get((mode, target))
            or (UNCOVERED if any(fault.uncovered for fault in faults) else ""),
        }
        assert tuple(row) == FIELDS
        made.append(row)
    return made


def _blame(faults: Sequence[Happened], times: Sequence[float], amounts: Sequence[int] | None = None) -> list[int]:
    """How much of `amounts`, at `times`, each fault answers for; what came before the first is the first's."""
    blamed = [0] * len(faults)
    for at_s, amount in zip(times, amounts or [1] * len(times), strict=True):
        before = [index for index, fault in enumerate(faults) if fault.at_s <= at_s]
        if faults:
            blamed[before[-1] if before else 0] += amount
    return blamed


def details(run: ModeRun, began_s: float) -> list[dict[str, Any]]:
    """Every fault for the file, with times in seconds after began_s."""
    entries = []
    for fault in run.faults:
        entry = asdict(fault)
        for name in ("at_s", "healed_s", "recovered_s", "until_s"):
            entry[name] = None if entry[name] is None else round(entry[name] - began_s, 3)
        gaps = [gap for s in run.streams if (gap := longest_gap_s(s, fault.at_s, fault.until_s)) is not None]
        entries.append(entry | {"counts": fault.counts, "gap_ms_max": round(1e3 * max(gaps), 1) if gaps else None})
    return entries


def changes(run: ModeRun, asks: Sequence[Ask], began_s: float) -> list[dict[str, Any]]:
    """The streams with wrong tokens: when the first came, how many, what was asked, where it began and ended."""
    found = []
    for number, (at_s, count) in sorted(run.changed.items())[:MOST_CHANGES]:
        stream = run.streams[number]
        found.append(
            {
                "at_s": round(at_s - began_s, 3),
                "tokens": count,
                "ask": stream.ask,
                "sampling": asks[stream.ask].sampling,
                "sent_s": round(stream.sent_s - began_s, 3),
                "resumed": len(stream.resumed_s),
                "error": stream.error,
            }
        )
    return found


def expected_reasons(replicas: int, routers: int, frontends: int) -> dict[tuple[str, str], str]:
    """Why requests may fail, or streams pause for longer, in some rows of a deployment of this shape."""
    reasons = {}
    for target in ("shard", "minority", "replicas"):
        if replicas == 1 or target == "replicas":
            reasons["corrupt-slice", target] = NO_COPY
    reasons["deadlock", "router"] = "a router that hangs ends itself after links.stuck_after_ms, 10 s"
    if routers == 1:
        reasons["crash", "router"] = "one router: streams wait until it has loaded again"
    if frontends == 1:
        reasons["crash", "frontend"] = "one replica: streams wait until Ray Serve has started another"
    return reasons


DEPLOYMENT = ("model", "dtype", "shape")


def with_rows_kept(old: Mapping[str, Any], new: Mapping[str, Any], ran: AbstractSet[tuple[str, str]]) -> dict[str, Any]:
    """`new`, with what `old`, a run of the same deployment, has of other (mode, target) than those that ran."""
    kept = {
        key: [entry for entry in old[key] if (entry["mode"], entry["target"]) not in ran] + new[key]
        for key in ("rows", "faults", "left_out")
    }
    lines = [line for line in old["timelines"] if not {(line["mode"], target) for target, _ in line["faults"]} & ran]
    return {**new, **kept, "timelines": lines + new["timelines"]}


def replaced(
    runs: Sequence[Mapping[str, Any]], new: Mapping[str, Any], ran: AbstractSet[tuple[str, str]]
) -> list[dict[str, Any]]:
    """The file's runs, one for each deployment, with `new` in its place."""
    of = [_deployment(run) for run in runs]
    if _deployment(new) not in of:
        return [*map(dict, runs), dict(new)]
    place = of.index(_deployment(new))
    return [with_rows_kept(run, new, ran) if index == place else dict(run) for index, run in enumerate(runs)]


def _deployment(run: Mapping[str, Any]) -> list[Any]:
    return [run[key] for key in DEPLOYMENT]


def read(path: Path) -> list[dict[str, Any]]:
    """The runs in a file. Raises BenchError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BenchError(f"{path} does not exist; `make chaos` writes it") from None
    except (OSError, ValueError) as error:
        raise BenchError(f"{path} cannot be read: {error}") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("runs"), list) or not raw["runs"]:
        raise BenchError(f"{path} holds no results of `make chaos`")
    runs: list[dict[str, Any]] = raw["runs"]
    return runs


def rate_before(streams: Sequence[Stream], from_s: float, until_s: float) -> float:
    """Tokens per second in the quiet time before the first fault."""
    tokens = sum(len(ids) for stream in streams for at_s, _, ids in stream.pieces if from_s <= at_s < until_s)
    return tokens / max(until_s - from_s, 1e-9)


def windows_end(faults: Sequence[Happened], end_s: float) -> None:
    """Each fault's window lasts until the next fault, or end_s."""
    for fault, following in pairwise(faults):
        fault.until_s = following.at_s
    if faults:
        faults[-1].until_s = end_s

"""How evenly shards are loaded, and how many bytes move: even, DeepSeek's EPLB, and ours.

python -m bench.balance [--eplb FILE]
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.balance_traces import Floats, Trace, traces
from bench.eplb import COMMIT, Eplb, source
from bench.errors import BenchError
from bench.machine import describe
from checkpoint.errors import DroverError
from cluster.policy.balance import BalanceSettings, ShardRoom, propose
from cluster.policy.load import Loads
from experts.placement import Placement, even_placement

ROOT = Path(__file__).parents[1]
OUT = ROOT / "bench" / "balance.json"
SPARE_SLOTS = (0, 1, 2, 4)
FREE_S = 1e6
"""Expected to be right for so long, a placement is worth any bytes, as it is to EPLB."""
Counts = npt.NDArray[np.int64]

DESCRIPTION = """\
Place experts by the load of one time, and see how even the shards' load is in the time after it.

Each trace has periods. Before each, a balancer is told the load of each expert in some windows; then the next windows
come. `even` is the placement that a deployment starts with, and all begin from it. EPLB and ours have as many slots.
`ours` takes whatever is better (no threshold, no smallest gain); `shipped` is what a deployment does by itself.

Imbalance: the most loaded shard's load over the mean of all shards, averaged over layers and periods; 1 is even.
Bytes: the weights of the experts that a shard gets and did not have.
"""
EPILOG = """\
examples:
  python -m bench.balance                          # fetches EPLB once; about 3 minutes
  python -m bench.balance --eplb ~/EPLB/eplb.py    # without the web
  python -m bench.balance --table                  # the table of bench/balance.json as Markdown
"""
HEAD = ("trace", "spare slots", "even", "EPLB", "ours", "shipped", "EPLB moves", "ours", "shipped")


def imbalance(count_LES: Counts, load_WLE: Floats) -> float:
    """Largest over mean load of the shards, averaged over layers. The copies of an expert share its load evenly."""
    load_LE = load_WLE.mean(axis=0)
    share_LE = load_LE / count_LES.sum(axis=2)
    load_LS = np.einsum("le,les->ls", share_LE, count_LES)
    used_LS = load_LS[load_LS.sum(axis=1) > 0]
    return float((used_LS.max(axis=1) / used_LS.mean(axis=1)).mean())


def counts(placement: Placement, num_shards: int) -> Counts:
    """count_LES: 1 where a shard holds an expert."""
    count_LES = np.zeros((len(placement.shards_of), len(placement.shards_of[0]), num_shards), np.int64)
    for layer, by_expert in placement.shards_of.items():
        for expert, shards in enumerate(by_expert):
            count_LES[layer, expert, list(shards)] = 1
    return count_LES


def moved(before_LES: Counts, after_LES: Counts) -> int:
    """Experts that a shard has now, and had not before."""
    return int(((after_LES > 0) & (before_LES == 0)).sum())


def row(trace: Trace, spare: int, eplb: Eplb) -> dict[str, Any]:
    """A trace with so many free slots on each shard and layer, which all balancers may fill."""
    _, _, num_layers, num_experts = trace.planned_PWLE.shape
    even = even_placement(range(num_layers), num_experts, trace.num_shards)
    slots = num_experts // trace.num_shards + spare
    shards = [ShardRoom(number, "", slots) for number in range(trace.num_shards)]
    settings = {
        "ours": BalanceSettings(
            reserved_slots=0,
            threshold=1.0,
            min_gain=0.0,
            horizon_s=FREE_S,
            expert_bytes=trace.expert_bytes,
            bandwidth_bytes_s=1e9,
        ),
        "shipped": BalanceSettings(reserved_slots=0, expert_bytes=trace.expert_bytes, bandwidth_bytes_s=1e9),
    }
    ours = dict.fromkeys(settings, even)
    now = dict.fromkeys(("even", "eplb", *settings), counts(even, trace.num_shards))
    known: dict[str, list[float]] = {name: [] for name in now}
    met: dict[str, list[float]] = {name: [] for name in now}
    moves, taken_s = dict.fromkeys(now, 0), []
    for planned_WLE, met_WLE in zip(trace.planned_PWLE, trace.met_PWLE, strict=True):
        then = {"even": now["even"], "eplb": eplb.place(planned_WLE.mean(axis=0), trace.num_shards, slots)}
        loads = Loads(tuple(range(num_layers)), planned_WLE)
        for name, chosen in settings.items():
            began_s = time.perf_counter()
            ours[name] = propose(loads, ours[name], shards, chosen).placement
            taken_s.append(time.perf_counter() - began_s)
            then[name] = counts(ours[name], trace.num_shards)
        for name, count_LES in then.items():
            moves[name] += moved(now[name], count_LES)
            known[name].append(imbalance(count_LES, planned_WLE))
            met[name].append(imbalance(count_LES, met_WLE))
        now = then
    figures = {name: round(float(np.mean(of)), 4) for name, of in known.items()}
    figures |= {f"{name}_next": round(float(np.mean(of)), 4) for name, of in met.items()}
    moved_bytes = {f"moved_bytes_{name}": moves[name] * trace.expert_bytes for name in ("eplb", *settings)}
    return {
        "trace": trace.name, "shards": trace.num_shards, "spare_slots": spare, **figures, **moved_bytes,
        "plan_ms": round(float(np.median(taken_s)) * 1e3, 1),
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows as Markdown."""
    lines = [_line(HEAD), _line(("---", *["---:"] * (len(HEAD) - 1)))]
    for of in rows:
        figures = (f"{of[name]:.3f}" for name in ("even", "eplb", "ours", "shipped"))
        sizes = (_size(of[f"moved_bytes_{name}"]) for name in ("eplb", "ours", "shipped"))
        lines.append(_line((of["trace"], str(of["spare_slots"]), *figures, *sizes)))
    return lines


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def read(file: Path) -> dict[str, Any]:
    """What a run has written. Raises BenchError."""
    try:
        results: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise BenchError(f"{file} cannot be read: {error}; `python -m bench.balance` writes it") from None
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 it did not work, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.balance",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--eplb", type=Path, metavar="FILE", help=f"eplb.py of commit {COMMIT[:10]}; default: fetch it")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="default: bench/balance.json")
    parser.add_argument("--table", action="store_true", help="print the table of --out, and measure nothing")
    args = parser.parse_args(argv)
    try:
        if not args.table:
            _measure(args.eplb, args.out)
        print("\n".join(table(read(args.out)["rows"])))
    except DroverError as error:
        print(f"bench.balance: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nbench.balance: stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


def _measure(given: Path | None, out: Path) -> None:
    eplb, rows = Eplb(source(ROOT / ".bench" / "eplb.py", given)), []
    for trace in traces():
        for spare in SPARE_SLOTS:
            rows.append(row(trace, spare, eplb))
            print(f"{trace.name}, {spare} spare slots", file=sys.stderr)
    results = {
        "machine": describe(ROOT / ".bench"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "eplb_commit": COMMIT,
        "rows": rows,
    }
    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

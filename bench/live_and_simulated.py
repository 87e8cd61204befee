"""`python -m bench.live_and_simulated`: the simulator's costs, measured; and how far it is off the live cluster."""

import argparse
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from bench.simulation_runs import Point
from checkpoint.errors import DroverError

ROOT = Path(__file__).parents[1]
OUT, DOCS = ROOT / "bench" / "simulation.json", ROOT / "docs" / "simulation.md"
BEGIN, END = "<!-- python -m bench.live_and_simulated writes from here -->", "<!-- to here -->"
LIVE = ROOT / ".bench" / "live_runs.json"
HELD_OUT_SHARDS, HELD_OUT_STREAMS = (3,), (8, 24)
DESCRIPTION = """\
Serve the embedded model with 1, 2, 3 and 4 shards, ask for recorded text with 1 to 32 streams
at once, fit the costs of `drover simulate` to some of these runs, simulate all of them, and
compare. Writes bench/simulation.json, and its tables into docs/simulation.md.

Runs with 3 shards, and those with 8 or 24 streams, are held out: no cost is fitted to them.
"""
EPILOG = """\
examples:
  python -m bench.live_and_simulated                  # everything: about 4 minutes on 2 cores
  python -m bench.live_and_simulated --shards 1,2     # measure a part; what .bench/live_runs.json has else is kept
  python -m bench.live_and_simulated --no-live        # fit and compare what was measured before
  python -m bench.live_and_simulated --table          # the tables of docs/simulation.md, from bench/simulation.json
"""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m bench.live_and_simulated",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--shards", type=_counts, default=(1, 2, 3, 4), metavar="N,N", help="default: 1,2,3,4")
    made.add_argument("--streams", type=_counts, default=(1, 4, 8, 16, 24, 32), metavar="N,N", help="1,4,8,16,24,32")
    made.add_argument("--repeats", type=int, default=3, metavar="N", help="of each; default: %(default)s")
    made.add_argument("--no-live", action="store_true", help="measure nothing")
    made.add_argument("--table", action="store_true", help="only print the tables of --out")
    made.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="default: bench/simulation.json")
    return made


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        counts = (0,)
    if not 1 <= counts[0] <= counts[-1] <= 64:
        raise argparse.ArgumentTypeError(f"{text!r} are no whole numbers from 1 to 64, such as 1,2")
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0 done, 1 it did not work, 2 wrong usage, 130 Ctrl-C."""
    args = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if args.table:
            print("\n".join(tables(json.loads(args.out.read_text()))))
            return 0
        if not args.no_live:
            measure([Point(shards, streams) for shards in args.shards for streams in args.streams], args.repeats)
        found = compared()
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        if args.out == OUT:
            DOCS.write_text(documented(DOCS.read_text(), found))
        print("\n".join(tables(found)))
    except DroverError as error:
        print(f"live_and_simulated: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nlive_and_simulated: stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def measure(points: Sequence[Point], repeats: int) -> None:
    """Run the live deployments, one for each number of shards; LIVE keeps what they gave."""
    from bench import simulation_runs
    from bench.drover_server import ClusterShape, serving
    from bench.machine import describe
    from bench.process import Worker

    work = ROOT / ".bench"
    work.mkdir(exist_ok=True)
    kept = json.loads(LIVE.read_text()) if LIVE.exists() else {"runs": []}
    for shards in sorted({point.shards for point in points}):
        here = [point for point in points if point.shards == shards]
        shape = ClusterShape(router_threads=2, shards=shards, shard_threads=1)
        runs = []
        with (
            serving(ROOT / "demo" / "drover-demo", shape, 64, work) as address,
            Worker("load", [sys.executable, "-m", "bench.load", address], work / "load.log") as worker,
        ):
            url = simulation_runs.metrics_url(work / "drover.yaml")
            for run in simulation_runs.live_runs(worker, url, here, repeats):
                print(f"{run.point} repeat {run.repeat}: {run.figures}", file=sys.stderr)
                runs.append(run)
        kept["runs"] = [run for run in kept["runs"] if run["point"]["shards"] != shards] + simulation_runs.plain(runs)
        kept |= {"machine": describe(work), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        LIVE.write_text(json.dumps(kept))


def is_held_out(point: Point) -> bool:
    return point.shards in HELD_OUT_SHARDS or point.streams in HELD_OUT_STREAMS


def compared() -> dict[str, Any]:
    """Fit the costs to the runs that are not held out, and set all runs beside their simulation."""
    from bench import simulation_fit
    from bench.errors import BenchError
    from bench.simulation_runs import LiveRun, scenario_of, simulated_run
    from checkpoint.config import read_config

    if not LIVE.exists():
        raise BenchError(f"{LIVE} does not exist; run without --no-live first")
    kept = json.loads(LIVE.read_text())
    runs = [LiveRun.of(raw) for raw in kept["runs"]]
    config = read_config(ROOT / "demo" / "drover-demo")
    fitted = [run for run in runs if not is_held_out(run.point)]
    if not fitted:
        raise BenchError(f"{LIVE} has no runs to fit; measure with --shards 1,2,4 --streams 1,4,16,32")
    costs: dict[str, Any] = {"jitter": 0.0}
    for _ in range(2):  # what each step asks of shards depends a little on how long steps take
        works = [simulated_run(scenario_of(config, run.point, costs), run.point, run.repeat) for run in fitted]
        costs = simulation_fit.fitted_costs(fitted, works, scenario_of(config, fitted[0].point, costs))
    exact = [simulated_run(scenario_of(config, run.point, costs), run.point, run.repeat) for run in fitted]
    costs["jitter"] = simulation_fit.fitted_jitter(list(zip(fitted, exact, strict=True)))
    rows = []
    for point in sorted({run.point for run in runs}, key=lambda point: (point.shards, point.streams)):
        here = [run for run in runs if run.point == point]
        simulated = [simulated_run(scenario_of(config, point, costs), point, run.repeat).figures for run in here]
        rows.append(row_of(point, [run.figures for run in here], simulated))
    return {"machine": kept["machine"], "date": kept["date"], "costs": costs, "rows": rows, "errors": errors_of(rows)}


def row_of(point: Point, live: Sequence[Any], simulated: Sequence[Any]) -> dict[str, Any]:
    """Medians over the repeats, and the simulator's relative errors in percent."""
    row: dict[str, Any] = {"shards": point.shards, "streams": point.streams, "held_out": is_held_out(point)}
    for name in ("tok_s", "gap_ms_p50", "gap_ms_p99"):
        ours, theirs = (median(getattr(figures, name) for figures in side) for side in (simulated, live))
        row[f"live_{name}"], row[f"simulated_{name}"] = round(theirs, 2), round(ours, 2)
        row[f"error_{name}"] = round(100.0 * (ours / theirs - 1.0), 1)
    return row


def errors_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Median and largest size of the errors in percent, of the runs that were fitted and of those held out."""
    errors = {}
    for label, of in (("fitted", False), ("held_out", True)):
        here = [row for row in rows if row["held_out"] == of]
        if here:
            errors[label] = {
                f"{name}_{which}": round(pick(abs(row[f"error_{name}"]) for row in here), 1)
                for name in ("tok_s", "gap_ms_p99")
                for which, pick in (("median", median), ("worst", max))
            }
    return errors


def tables(found: Mapping[str, Any]) -> list[str]:
    """Markdown: every setting, and the errors in short."""
    head = ("shards", "streams", "tokens/s live", "simulated", "error", "p99 gap ms live", "simulated", "error", "")
    lines = [_cells(head), _cells(["---"] * len(head))]
    for row in found["rows"]:
        cells = [row["shards"], row["streams"]]
        for name, digits in (("tok_s", 0), ("gap_ms_p99", 1)):
            cells += [f"{row[f'live_{name}']:.{digits}f}", f"{row[f'simulated_{name}']:.{digits}f}"]
            cells += [f"{row[f'error_{name}']:+.0f} %"]
        lines.append(_cells([*cells, "held out" if row["held_out"] else "fitted"]))
    lines += ["", _cells(("runs", "tokens/s, median error", "worst", "p99 gap, median error", "worst"))]
    lines.append(_cells(["---"] * 5))
    for label, errors in found["errors"].items():
        lines.append(_cells([label.replace("_", " "), *(f"{value:.0f} %" for value in errors.values())]))
    return lines


def documented(text: str, found: Mapping[str, Any]) -> str:
    """The document with these tables between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    machine = found["machine"]
    told = f"Measured on {found['date'][:10]} on {machine['cores']} cores of {machine['cpu']}."
    return "\n".join([before + BEGIN, "", told, "", *tables(found), "", END + after])


def _cells(cells: Sequence[object]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


if __name__ == "__main__":
    raise SystemExit(main())

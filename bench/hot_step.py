"""`python -m bench.hot_step`: traffic steps onto 4 experts of each layer; a live cluster beside the simulator."""

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint.errors import DroverError

ROOT = Path(__file__).parents[1]
OUT, COSTS = ROOT / "bench" / "hot_step.json", ROOT / "bench" / "simulation.json"
SHARDS, SLOTS, HOT = 4, 40, 4
FROM_S, UNTIL_S, END_S = 25.0, 60.0, 95.0
BASE_PER_S, BASE_PROMPT, BASE_OUTPUT = 6.0, 48, 48
HOT_PER_S, HOT_PROMPT, HOT_OUTPUT = 10.0, 192, 2
AUTOSCALE = {
    "dry_run": False, "metrics_interval_s": 1.0, "look_back_period_s": 20.0, "stable_window_s": 15.0,
    "panic_window_s": 4.0, "upscale_delay_s": 25.0, "downscale_delay_s": 15.0, "cooldown_s": 5.0,
}  # fmt: skip
READ_S = 1.0
DESCRIPTION = f"""\
Serve the embedded model on {SHARDS} shards, each with {SLOTS} slots for the 32 experts of a
layer that it begins with. Some streams run all the time. After {FROM_S:.0f} s, prompts come for
{UNTIL_S - FROM_S:.0f} s that go to {HOT} experts of each layer, all of them on one shard. Copies should
appear within 10 s, and balance and gaps recover.

The simulator gets the same requests, with the experts that their tokens have, and
the costs in bench/simulation.json. Writes bench/hot_step.json, and with --plot a
picture of both.
"""


@dataclass(frozen=True)
class Asked:
    """A request of the plan. hot: the index of its hot prompt; None for the streams that run all the time."""

    at_s: float
    prompt: tuple[int, ...]
    output_tokens: int
    position: int
    hot: int | None


def plan(seed: int = 0) -> tuple[list[Asked], np.ndarray]:
    """The requests in order, and the experts_TL of the trace that their positions are in."""
    from bench.hot_tokens import Recorder, hot_prompts
    from cluster.simulation.routing import read_trace
    from cluster.simulation.scenario import DEMO_TRACE

    prompts, hot_TL = hot_prompts(Recorder(ROOT / "demo" / "drover-demo"), SHARDS, HOT, HOT_PROMPT)
    trace_TL = read_trace(DEMO_TRACE)
    with np.load(DEMO_TRACE, allow_pickle=False) as stored:
        ids_T = stored["ids_T"]
    rng = np.random.default_rng(seed)
    asked = []
    for at_s in _times(rng, BASE_PER_S, 0.0, END_S):
        position = int(rng.integers(len(trace_TL) - BASE_PROMPT - BASE_OUTPUT))
        prompt = tuple(ids_T[position : position + BASE_PROMPT].tolist())
        asked.append(Asked(at_s, prompt, BASE_OUTPUT, position, None))
    for number, at_s in enumerate(_times(rng, HOT_PER_S, FROM_S, UNTIL_S)):
        hot = number % HOT
        asked.append(Asked(at_s, tuple(prompts[hot]), HOT_OUTPUT, len(trace_TL) + hot * HOT_PROMPT, hot))
    return sorted(asked, key=lambda each: each.at_s), np.concatenate([trace_TL, hot_TL])


def _times(rng: np.random.Generator, rate: float, from_s: float, until_s: float) -> list[float]:
    count = round(rate * (until_s - from_s))
    return sorted((from_s + rng.random(count) * (until_s - from_s)).tolist())


def series(tokens: Sequence[tuple[float, float | None]], rows: Sequence[tuple[float, Sequence[float]]]) -> list[Any]:
    """A row for each second. tokens: when each token of a lasting stream came, and the gap before it in ms, if any.

    rows: at some times, the rows that each shard has had since the start.
    """
    times_R = np.array([time_s for time_s, _ in rows])
    rows_RS = np.array([of for _, of in rows], float)
    found = []
    for second in range(1, int(END_S) + 1):
        here = [gap for time_s, gap in tokens if second - 1 <= time_s < second]
        gaps = [gap for gap in here if gap is not None]
        # Samples are about a second apart, and not at whole ones.
        rose_S = np.array([np.interp([second - 1, second], times_R, of) for of in rows_RS.T]) @ [-1.0, 1.0]
        found.append(
            {
                "time_s": second,
                "tok_s": len(here),
                "gap_ms_p50": float(np.percentile(gaps, 50)) if gaps else None,
                "gap_ms_p99": float(np.percentile(gaps, 99)) if gaps else None,
                "imbalance": float(rose_S.max() / rose_S.mean()) if rose_S.mean() > 0 else None,
            }
        )
    return found


def tokens_of(asked: Sequence[Asked], streams: Sequence[Any]) -> list[tuple[float, float | None]]:
    """Of the streams that run all the time."""
    tokens: list[tuple[float, float | None]] = []
    for request, stream in zip(asked, streams, strict=True):
        if request.hot is None and stream.token_s:  # one that failed may have none
            gaps = [None, *(1e3 * gap for gap in np.diff(stream.token_s))]
            tokens += zip(stream.token_s, gaps, strict=True)
    return tokens


def simulate(asked: Sequence[Asked], experts_TL: np.ndarray, costs: Mapping[str, Any]) -> dict[str, Any]:
    """The same requests in the simulator."""
    from bench.simulation_runs import CORES
    from cluster.simulation.recorder import Recorder
    from cluster.simulation.scenario import parse_scenario
    from cluster.simulation.simulation import Simulation
    from cluster.simulation.traffic import Arrival

    trace = ROOT / ".bench" / "hot_trace.npz"
    trace.parent.mkdir(exist_ok=True)
    np.savez_compressed(trace, experts_TL=experts_TL.astype(np.uint8))
    scenario = parse_scenario(
        {
            "duration_s": END_S + 5.0,
            "shards": {"count": SHARDS, "slots": SLOTS, "per_node": SHARDS, "parallel": CORES},
            "routing": {"source": "trace", "trace": str(trace)},
            "autoscale": AUTOSCALE,
            "costs": dict(costs),
        }
    )
    arrivals = [Arrival(each.at_s, len(each.prompt), each.output_tokens, each.position) for each in asked]
    tokens: list[tuple[float, float | None]] = []
    rows: list[tuple[float, Sequence[float]]] = [(0.0, [0.0] * SHARDS)]
    total_S = np.zeros(SHARDS)

    class Keeper(Recorder):
        def step(self, told: Any, work: Any) -> None:
            super().step(told, work)
            nonlocal total_S
            total_S = total_S + work.rows_LS.sum(axis=0)
            rows.append((simulation.now_s, total_S.tolist()))
            lasting = [each for each in told if each.output_tokens == BASE_OUTPUT]
            tokens.extend((simulation.now_s, None if each.is_first else 1e3 * each.gap_s) for each in lasting)

    simulation = Simulation(scenario, arrivals)
    simulation.recorder = Keeper(scenario.model.moe_layers, SHARDS)
    result = simulation.run()
    acted = [row for row in result["decisions"] if row["decision"] != "hold"]
    copies = [(row["time_s"], row["copies"]) for row in result["series"]]
    return {
        "series": series(tokens, rows),
        "decisions": [{"time_s": row["time_s"], "text": row["reason"]} for row in acted],
        "copies": [
            change for before, change in zip([(0, 1.0), *copies], copies, strict=False) if before[1] != change[1]
        ],
        "moved_bytes": result["summary"]["moved_bytes"],
        "failed": result["summary"]["refused"],
    }


def live(asked: Sequence[Asked]) -> dict[str, Any]:
    """The same requests over gRPC, and what shards and the controller say meanwhile."""
    from bench.drover_server import ClusterShape, serving
    from bench.process import Worker
    from bench.simulation_runs import metrics_url
    from bench.worker import Request

    work = ROOT / ".bench"
    work.mkdir(exist_ok=True)
    shape = ClusterShape(router_threads=2, shards=SHARDS, shard_threads=1)
    # Prompts that were computed before must be computed again: they are the load.
    changes: dict[str, dict[str, Any]] = {
        "shards": {"slots": SLOTS},
        "engine": {"prefix_cache": False},
        "autoscale": {"paused": False} | AUTOSCALE,
    }
    requests = [Request(list(each.prompt), each.output_tokens, each.at_s) for each in asked]
    with (
        serving(ROOT / "demo" / "drover-demo", shape, 64, work, changes) as address,
        Worker("load", [sys.executable, "-m", "bench.load", address], work / "load.log") as worker,
        Watch(metrics_url(work / "drover.yaml")) as watch,
    ):
        watch.began_s = time.time()
        answer = worker.ask(requests)
        watch.began_s = time.time() - answer.wall_s  # connecting took a while
        found = watch.events()
    failed = sum(stream.error is not None for stream in answer.streams)
    return {
        "series": series(tokens_of(asked, answer.streams), [(at_s - watch.began_s, rows) for at_s, rows in watch.rows]),
        "decisions": [event for event in found if event["kind"] in ("decision", "operation")],
        "failed": failed,
    }


class Watch:
    """Reads the rows of each shard every READ_S, in a thread. Times are time.time()."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.began_s = 0.0
        self.rows: list[tuple[float, Sequence[float]]] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(30.0)

    def _run(self) -> None:
        import urllib.request

        from bench.chaos.counters import samples

        while not self._stopped.is_set():
            try:
                with urllib.request.urlopen(self._url, timeout=5.0) as page:
                    found = samples(page.read().decode())
            except OSError:
                found = []  # busy; the next one comes soon
            by_shard = {each.labels["shard"]: each.value for each in found if each.name == "drover_shard_rows_total"}
            if len(by_shard) == SHARDS:
                self.rows.append((time.time(), [by_shard[name] for name in sorted(by_shard)]))
            self._stopped.wait(READ_S)

    def events(self) -> list[dict[str, Any]]:
        """What the controller tells of this run."""
        import subprocess

        from bench.drover_server import NAMESPACE

        command = [sys.executable, "-m", "cli.main", "events", "--last", "256", "--json", "--namespace", NAMESPACE]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60.0)
        events = [json.loads(line) for line in done.stdout.splitlines()]
        return [
            {
                "time_s": round(event["time_s"] - self.began_s, 2),
                **{key: event[key] for key in ("kind", "subject", "text")},
            }
            for event in events
        ]


def facts(found: Mapping[str, Any]) -> dict[str, float | None]:
    """The claims in numbers: seconds until a change began after the step, and balance and gaps before, at worst, after.

    recovered: over the last 10 s of the step.
    """
    rows = found["series"]

    def mean(name: str, from_s: float, until_s: float) -> float | None:
        values = [row[name] for row in rows if from_s < row["time_s"] <= until_s and row[name] is not None]
        return round(float(np.mean(values)), 2) if values else None

    began = [each["time_s"] for each in found["decisions"] if FROM_S <= each["time_s"] < UNTIL_S]
    numbers: dict[str, float | None] = {"decided_after_s": round(min(began) - FROM_S, 1) if began else None}
    for name in ("imbalance", "gap_ms_p99"):
        numbers |= {
            f"{name}_before": mean(name, FROM_S - 10, FROM_S),
            f"{name}_hit": mean(name, FROM_S + 1, FROM_S + 4),
            f"{name}_recovered": mean(name, UNTIL_S - 10, UNTIL_S),
            f"{name}_after": mean(name, END_S - 15, END_S - 5),
        }
    return numbers


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Both sides, one beside the other. Raises DroverError."""
    from cluster.simulation import plot

    plot.check()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    sides = [side for side in ("live", "simulated") if side in found]
    size = (5.5 * len(sides), 6.5)
    figure, axes = plt.subplots(
        3, len(sides), figsize=size, sharex=True, sharey="row", squeeze=False, layout="constrained"
    )
    names = (("tok_s", "tokens/s"), ("gap_ms_p99", "gap p99, ms"), ("imbalance", "max / mean rows of shards"))
    for column, side in enumerate(sides):
        rows = found[side]["series"]
        for axis, (name, label) in zip(axes[:, column], names, strict=True):
            values = [float("nan") if row[name] is None else row[name] for row in rows]
            axis.plot([row["time_s"] for row in rows], values, color="#0072B2", linewidth=1.3)
            axis.axvspan(FROM_S, UNTIL_S, color="#E69F00", alpha=0.15, linewidth=0)
            for each in found[side]["decisions"]:
                axis.axvline(each["time_s"], color="#888888", linewidth=0.6, linestyle=":")
            axis.set_ylim(bottom=0)
            if column == 0:
                axis.set_ylabel(label)
        axes[0, column].set_title(side, loc="left")
        axes[-1, column].set_xlabel("seconds; shaded: the hot prompts; dotted: decisions and operations")
    figure.savefig(path, dpi=120, facecolor="white")
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0 done, 1 it did not work, 2 wrong usage, 130 Ctrl-C."""
    made = argparse.ArgumentParser(
        prog="python -m bench.hot_step", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--no-live", action="store_true", help="simulate only; the live side of --out is kept")
    made.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="default: bench/hot_step.json")
    made.add_argument("--plot", type=Path, metavar="PNG", help="draw both sides; needs matplotlib")
    args = made.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        asked, experts_TL = plan()
        found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
        costs = json.loads(COSTS.read_text())["costs"] if COSTS.exists() else {}
        found["simulated"] = simulate(asked, experts_TL, costs)
        if not args.no_live:
            found["live"] = live(asked)
            found["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        found["facts"] = {side: facts(found[side]) for side in ("live", "simulated") if side in found}
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found["facts"], indent=1))
        if args.plot is not None:
            draw(found, args.plot)
    except DroverError as error:
        print(f"hot_step: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nhot_step: stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

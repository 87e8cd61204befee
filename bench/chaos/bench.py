"""The whole fault bench: layouts one after the other, in each its modes, and what is written after each mode."""

import argparse
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import results as files
from bench.chaos import leaks, reference, results, table
from bench.chaos.asks import Ask, asks
from bench.chaos.faults import Injector
from bench.chaos.gaps import tokens_per_s
from bench.chaos.hosts import Hosts
from bench.chaos.load_process import speed_tok_s
from bench.chaos.network import missing
from bench.chaos.records import Stream
from bench.chaos.results import Happened, ModeRun
from bench.chaos.run import Pace, Run
from bench.chaos.schedule import ALLOWED, HOSTS, LOCAL, MODES, schedule
from bench.chaos.system import Shape, System
from bench.checkpoint import ensure_checkpoint
from bench.errors import BenchError
from bench.machine import describe
from bench.process import ROOT
from checkpoint.config import read_config

EMBEDDED, BENCHMARK = ROOT / "demo" / "drover-demo", Path("benchmark")
NUMBER_OF_ASKS = 30
STREAMS = 16
"""With so many always running the speed is measured; arrivals then ask for SHARE of it, so that about 12 run."""
SHARE = 0.75
SPEED_S = 6.0
BIN_S = 0.5
NODES = 4
"""In network namespaces: the head, and three with room for three shards each."""
LOG_BYTES = 192 * 2**20


@dataclass(frozen=True)
class Plan:
    """What to run. modes: None for all that can be run here. targets: None for each mode's own."""

    seed: int
    modes: tuple[str, ...] | None
    targets: tuple[str, ...] | None
    cycles: int
    points: bool
    dtype: str
    checkpoint: Path | None
    shape: Shape
    rate_per_s: float | None
    quiet_s: float
    leaks: bool
    out: Path

    @staticmethod
    def of(args: argparse.Namespace) -> "Plan":
        """From the command line."""
        shape = Shape(args.shards, args.replicas, args.routers, args.frontends, heal_s=float(args.heal_s))
        return Plan(
            args.seed, args.modes, args.targets, args.cycles, not args.no_points, args.dtype, args.checkpoint, shape,
            args.rate, float(args.quiet_s), args.leaks, args.out,
        )  # fmt: skip


class Bench:
    """One run of a plan."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self._plan, self._say = plan, console.print
        self._console = console
        work = ROOT / ".bench" / "chaos"
        work.mkdir(parents=True, exist_ok=True)
        self._work = work
        self._found: dict[str, Any] = {}
        self._before: list[dict[str, Any]] = []
        """What the file has of other runs."""
        self._ran: set[tuple[str, str]] = set()
        """(mode, target) of this one."""

    def run(self) -> dict[str, Any]:
        """Everything that the plan names; returns the file's contents. Raises BenchError."""
        plan = self._plan
        source = self._source()
        checkpoint = reference.of_dtype(source, plan.dtype, self._work)
        config = read_config(checkpoint)
        wanted = plan.modes or tuple(mode for mode in MODES if MODES[mode].by_default)
        no_root = missing()
        left_out = [{"mode": mode, "target": "all", "why": no_root} for mode in wanted if _needs_root(mode) and no_root]
        modes = [mode for mode in wanted if not (_needs_root(mode) and no_root)]
        if not modes:
            raise BenchError(f"none of {', '.join(wanted)} can run here: {no_root}")
        machine = describe(self._work)
        self._found = {
            "title": f"{source.name}, {plan.dtype}, {plan.shape}, on {machine['cpu']}, {machine['cores']} cores",
            "machine": machine,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seed": plan.seed,
            "model": source.name,
            "dtype": plan.dtype,
            "shape": asdict(plan.shape),
            "rows": [],
            "faults": [],
            "left_out": left_out,
            "leaks": [],
            "timelines": [],
        }
        self._ran = {(mode, target) for mode in wanted for target in (self._targets(mode) or MODES[mode].targets)}
        self._ran |= {(mode, "all") for mode in wanted}
        self._before = results.read(plan.out) if plan.out.exists() else []
        for entry in left_out:
            self._say(f"left out: {entry['mode']}: {entry['why']}")
        self._say("computing what one process answers")
        asked = asks(plan.seed, NUMBER_OF_ASKS, config.vocab_size, greedy_only=plan.dtype != "float32")
        expected = reference.answers(checkpoint, asked, self._work)

        def judge(streams: Sequence[Stream]) -> dict[int, tuple[float, int]]:
            if plan.dtype == "float32":
                return results.changed_exactly(streams, expected)
            return reference.far_tokens(checkpoint, asked, streams)

        for layout in (LOCAL, HOSTS):
            chosen = [mode for mode in modes if MODES[mode].layout == layout]
            if chosen:
                self._layout(layout, chosen, checkpoint, asked, judge)
        return self._found

    def _layout(self, layout: str, modes: Sequence[str], checkpoint: Path, asked: Sequence[Ask], judge: Any) -> None:
        plan = self._plan
        with ExitStack() as stack:
            hosts = None
            if layout == HOSTS:
                self._say(f"starting {NODES} Ray nodes in network namespaces")
                hosts = stack.enter_context(Hosts(NODES, plan.shape.routers))
            logs = stack.enter_context(_file_system()) if "disk-full" in modes else None
            self._say(f"starting {plan.shape}")
            tmpdir = str(logs) if logs else ""
            system = stack.enter_context(System(checkpoint, plan.shape, self._work, hosts, tmpdir))
            rate = plan.rate_per_s or self._rate(system, asked)
            injector = Injector(system, logs)
            before = leaks.look(system)
            for mode in modes:
                faults = schedule(plan.seed, mode, self._targets(mode), plan.cycles, plan.points)
                with self._progress(mode, len(faults)) as tell:
                    run = Run(system, injector, Pace(rate, plan.quiet_s), self._say, tell)
                    done = run.mode(faults, asked, judge, self._work)
                rate = run.rate_per_s
                self._keep(mode, layout, done, asked, rate, run.skipped)
            if plan.leaks:
                self._found["leaks"] += leaks.wait_for_none(before, system)
                self._save()

    def _keep(
        self,
        mode: str,
        layout: str,
        done: ModeRun,
        asked: Sequence[Ask],
        rate: float,
        skipped: Sequence[tuple[str, str, str]],
    ) -> None:
        reasons = results.expected_reasons(
            self._plan.shape.replicas, self._plan.shape.routers, self._plan.shape.frontends
        )
        self._found["left_out"] += [{"mode": name, "target": target, "why": why} for name, target, why in skipped]
        if done.faults:
            self._found["rows"] += results.rows(done, reasons)
            began_s = min(fault.at_s for fault in done.faults) - self._plan.quiet_s
            self._found["faults"] += results.details(done, began_s)
            self._found["timelines"].append(
                {
                    "mode": mode,
                    "layout": layout,
                    "tokens_per_s": [
                        (round(at_s - began_s, 2), speed)
                        for at_s, speed in tokens_per_s(done.streams, began_s, done.faults[-1].until_s, BIN_S)
                    ],
                    "faults": [(fault.target, round(fault.at_s - began_s, 2)) for fault in done.faults],
                    "changed": results.changes(done, asked, began_s),
                    "failed": sorted({stream.error for stream in done.streams if stream.error is not None})[:5],
                    "rate_per_s": round(rate, 3),
                    "speed_before": round(done.rate_tok_s, 1),
                }
            )
        self._save()

    def _save(self) -> None:
        files.write(self._plan.out, {"runs": results.replaced(self._before, self._found, self._ran)})

    def _rate(self, system: System, asked: Sequence[Ask]) -> float:
        speed = speed_tok_s(system.address, asked, STREAMS, SPEED_S)
        mean = sum(ask.max_tokens for ask in asked) / len(asked)
        rate = SHARE * speed / mean
        if rate <= 0:
            raise BenchError("the deployment made no token; its log is .bench/chaos/chaos-serve.log")
        self._say(f"{STREAMS} streams make {speed:.0f} tokens/s: {rate:.2f} requests/s of {mean:.0f} tokens")
        return rate

    def _source(self) -> Path:
        given = self._plan.checkpoint
        if given is None:
            return EMBEDDED
        if given == BENCHMARK:
            folder = ROOT / ".bench" / "maverick-mini"
            ensure_checkpoint(folder)
            return folder
        return given.resolve()

    def _targets(self, mode: str) -> tuple[str, ...] | None:
        """The plan's, as far as the mode can hit them; else its own."""
        given = [target.removeprefix(f"{mode}:") for target in self._plan.targets or ()]
        return tuple(target for target in given if target in ALLOWED[mode]) or None

    @contextmanager
    def _progress(self, mode: str, count: int) -> Iterator[Any]:
        bars = Progress(
            TextColumn("{task.description:15}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[last]}"), console=self._console,
        )  # fmt: skip
        with bars:
            task = bars.add_task(mode, total=count, last="")

            def tell(fault: Happened) -> None:
                took = "not well" if fault.recovered_s is None else f"well after {fault.recovered_s - fault.at_s:.1f} s"
                told = f"{', '.join(fault.victims)} at {fault.point}: {took}"
                bars.update(task, advance=1, last=told)
                if not self._console.is_terminal:  # a log has no bars
                    self._say(f"  {told}; {fault.note or ', '.join(fault.evidence)}")

            yield tell


def run(plan: Plan) -> int:
    """Run a plan, print the table; returns the exit code: 1 if a row lost what it should not."""
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    found = Bench(plan, console).run()
    table.show(found, Console(highlight=False, markup=False, width=190))
    console.print(f"written to {plan.out}; `python -m bench.chaos.plot` draws it")
    return 0 if is_good(found) else 1


def is_good(found: dict[str, Any]) -> bool:
    """Whether nothing was lost but where the row says why it may be, every fault counted, and all was well again."""
    return (
        bool(found["rows"])
        and not found["leaks"]
        and all(entry["target"] == "all" for entry in found["left_out"])
        and all(fault["counts"] and not fault["restarted"] for fault in found["faults"])
        and all(
            row["tokens_changed"] == 0
            and row["recovered_s"] is not None
            and (row["requests_failed"] == 0 or row["expected"] == results.NO_COPY)
            for row in found["rows"]
        )
    )


def _needs_root(mode: str) -> bool:
    return MODES[mode].needs_root or MODES[mode].layout == HOSTS


@contextmanager
def _file_system() -> Iterator[Path]:
    """A small file system of its own in memory, for logs. Its path is short: HAProxy's and Ray's sockets are in it."""
    folder = Path(tempfile.mkdtemp(prefix="d", dir="/tmp"))
    short = folder.rename(f"/tmp/d{folder.name[-2:]}")
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={LOG_BYTES},mode=0700", "drover-chaos", str(short)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise BenchError(f"no file system could be mounted for logs: {done.stderr.strip()}")
        yield short
    finally:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        subprocess.run(["umount", "--lazy", str(short)], capture_output=True, check=False)
        shutil.rmtree(short, ignore_errors=True)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

"""`python -m bench.moving`: what streams notice while experts move from shard to shard, and back."""

import argparse
import itertools
import json
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

from bench.errors import BenchError
from bench.measure import percentile
from checkpoint.config import read_config
from checkpoint.errors import DroverError
from experts.placement import Placement, even_placement

ROOT = Path(__file__).parents[1]
NAMESPACE = "drover-moving"
STREAMS, TOKENS, SHARDS = 4, 200, 2
MOVE_S = 120.0
DESCRIPTION = """\
Serve a checkpoint with 2 shards, and read 4 streams. In turn, nothing else happens, or all experts move to the other
shard and back, again and again. Tells the gaps between tokens of both. No stream may fail.
"""
EPILOG = """\
examples:
  python -m bench.moving                                  # the embedded model; about 1 minute
  python -m bench.moving --checkpoint .bench/maverick-mini --seconds 10
  python -m bench.moving --load-mbps 1000 --rounds 2      # read faster, and see what that costs
"""


@dataclass(frozen=True)
class Gaps:
    """Between two tokens of a stream."""

    median_ms: float
    p99_ms: float
    longest_ms: float


def gaps_in(times_of: Sequence[Sequence[float]]) -> Gaps:
    """times_of: when each stream's tokens came, in seconds; the first one has no gap.

    Example: tokens at 1.0, 1.1 and 1.4 s have gaps of 100 and 300 ms.
    """
    gaps_ms = [1e3 * (after - before) for times in times_of for before, after in pairwise(times)]
    if not gaps_ms:
        raise BenchError("no stream had two tokens; measure for longer, with a higher --seconds")
    return Gaps(percentile(gaps_ms, 50), percentile(gaps_ms, 99), max(gaps_ms))


@dataclass(frozen=True)
class Report:
    """Medians over rounds. tok_s: of all streams. changes, moved_bytes: in all rounds."""

    still: Gaps
    moving: Gaps
    still_tok_s: float
    moving_tok_s: float
    changes: int
    moved_bytes: int
    load_mbps: float

    @property
    def longest_ratio(self) -> float:
        return self.moving.longest_ms / self.still.longest_ms


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m bench.moving",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--checkpoint", type=Path, default=ROOT / "demo" / "drover-demo", metavar="DIR")
    made.add_argument("--rounds", type=int, default=4, metavar="N", help="of both; default: %(default)s")
    made.add_argument("--seconds", type=float, default=6.0, metavar="S", help="of each; default: %(default)g")
    made.add_argument("--load-mbps", type=float, default=200.0, metavar="MB", help="default: %(default)g")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        report = measure(arguments.checkpoint, arguments.rounds, arguments.seconds, arguments.load_mbps)
    except DroverError as error:
        print(f"bench.moving: {error}", file=sys.stderr)
        return 1
    print(f"{'':8}{'tok/s':>8}{'median':>10}{'p99':>10}{'longest gap':>14}")
    for name, gaps, tok_s in (
        ("still", report.still, report.still_tok_s),
        ("moving", report.moving, report.moving_tok_s),
    ):
        print(f"{name:8}{tok_s:8.0f}{gaps.median_ms:7.1f} ms{gaps.p99_ms:7.1f} ms{gaps.longest_ms:11.1f} ms")
    print(
        f"longest gap {report.longest_ratio:.2f} times as long; {report.changes} changes moved "
        f"{report.moved_bytes / 1e6:.0f} MB at up to {report.load_mbps:g} MB/s for each shard"
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(asdict(report), indent=1) + "\n")
    return 0


def measure(checkpoint: Path, rounds: int, seconds: float, load_mbps: float) -> Report:
    """Raises DroverError."""
    config = read_config(checkpoint)
    if not config.moe_layers:
        raise BenchError(f"checkpoint {checkpoint} has no experts to move; choose a mixture-of-experts model")
    homes = [even_placement(config.moe_layers, config.num_experts, SHARDS)]
    homes.append(_swapped(homes[0]))
    still: list[tuple[Gaps, float]] = []
    moving: list[tuple[Gaps, float]] = []
    with _serving(checkpoint, load_mbps, slots=homes[0].most_per_layer * 5 // 4 + 2) as address:
        mover = Mover(homes)
        read(address, seconds / 2)  # warm
        for _ in range(rounds):
            still.append(read(address, seconds))
            with mover.moving():
                moving.append(read(address, seconds))
    return Report(
        _medians([gaps for gaps, _ in still]),
        _medians([gaps for gaps, _ in moving]),
        statistics.median(tok_s for _, tok_s in still),
        statistics.median(tok_s for _, tok_s in moving),
        mover.changes,
        mover.moved_bytes,
        load_mbps,
    )


def read(address: str, seconds: float) -> tuple[Gaps, float]:
    """Gaps, and tokens per second, of streams that follow one another for so long. Raises what a stream raises."""
    from client import Client

    end_s = time.monotonic() + seconds
    with Client(address) as client, ThreadPoolExecutor(STREAMS) as threads:

        def stream(nth: int) -> list[list[float]]:
            told = []
            for turn in itertools.count():
                times = []
                prompt = [17 + nth, 300 + turn % 50, *range(40, 60)]
                deltas = client.generate(prompt, max_tokens=TOKENS, temperature=0, ignore_eos=True, resume_s=0)
                for _ in deltas:
                    times.append(time.monotonic())
                told.append([at_s for at_s in times if at_s <= end_s])
                if time.monotonic() > end_s:
                    return told
            raise AssertionError

        began_s = time.monotonic()
        of_streams = [times for told in threads.map(stream, range(STREAMS)) for times in told]
    return gaps_in(of_streams), sum(map(len, of_streams)) / (end_s - began_s)


class Mover:
    """Has all experts moved to and fro, while it is asked to. changes: how often that was done."""

    def __init__(self, homes: Sequence[Placement]) -> None:
        from cluster.controller_client import ControllerClient

        self._controller = ControllerClient(NAMESPACE)
        self._homes = itertools.cycle(homes[::-1])
        self.changes = self.moved_bytes = 0
        self._failure: Exception | None = None

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Begins the next move as soon as one has ended; raises if one fails."""
        is_over = threading.Event()
        thread = threading.Thread(target=self._move, args=(is_over,))
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join(MOVE_S)
        if self._failure is not None:
            raise self._failure

    def _move(self, is_over: threading.Event) -> None:
        try:
            while not is_over.is_set():
                operation_id = f"move-{self.changes}"
                self._controller.change(operation_id, next(self._homes), "rebalance")
                deadline_s = time.monotonic() + MOVE_S
                while (status := self._controller.operation(operation_id)) is None or not status.has_ended:
                    if time.monotonic() > deadline_s:
                        raise BenchError(f"{operation_id} did not end within {MOVE_S:g} s: {status}")
                    time.sleep(0.1)  # nobody tells when a change has ended
                if status.reason:
                    raise BenchError(f"{operation_id} was aborted: {status.reason}")
                self.changes += 1
                self.moved_bytes += status.moved_bytes
        except Exception as error:
            self._failure = error


@contextmanager
def _serving(checkpoint: Path, load_mbps: float, slots: int) -> Iterator[str]:
    """A deployment on a Ray of this process; gives its address."""
    from cluster import launch, ray_runtime
    from cluster.config import parse_deployment
    from cluster.free_ports import free_ports

    ports = free_ports(3)
    raw = {
        "checkpoint": str(checkpoint.resolve()),
        "ray": {"namespace": NAMESPACE, "num_cpus": 4},  # reservations, not cores
        "router": {"cpus": 0.5},
        "shards": {"count": SHARDS, "cpus": 0.1, "slots": slots},
        "placement": {"load_mbps": load_mbps},
        "frontend": dict(zip(("grpc_port", "http_port"), ports, strict=False)),
        "admin": {"port": ports[2]},
        "autoscale": {"paused": True},
    }
    try:
        yield launch.start(parse_deployment(raw), _Silent()).address
    finally:
        ray_runtime.disconnect()


class _Silent:
    def stage(self, text: str) -> None:
        pass

    def loading(self, name: str, state: object) -> None:
        pass


def _swapped(placement: Placement) -> Placement:
    """Every expert on the next shard."""
    shards_of = {
        layer: tuple(tuple((shard + 1) % SHARDS for shard in shards) for shards in by_expert)
        for layer, by_expert in placement.shards_of.items()
    }
    return replace(placement, shards_of=shards_of)


def _medians(rounds: Sequence[Gaps]) -> Gaps:
    return Gaps(*(statistics.median(getattr(gaps, field) for gaps in rounds) for field in Gaps.__dataclass_fields__))


if __name__ == "__main__":
    sys.exit(main())

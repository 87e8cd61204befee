"""make fuzz: thousands of malformed requests a method, beside good streams.

    python -m tests.fuzz [--requests N] [--seed S] [--address HOST:PORT [--pid PID]]
    python -m tests.fuzz --replay FILE [--address HOST:PORT]

A request that is not answered as it should be is saved as a file below --failures, to be sent again
with --replay.
"""

import argparse
import asyncio
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench.worst_requests import a_server
from tests.fuzz.campaign import fuzz, status_of
from tests.fuzz.malformed import METHODS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000, help="a method; default: %(default)s")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="default: a random one, which is told")
    parser.add_argument("--address", help="a running server; default: a tiny model, in a process of its own")
    parser.add_argument("--pid", type=int, help="process of that server, to watch its memory")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"), help="default: %(default)s")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="send one saved request")
    arguments = parser.parse_args()
    with _server(arguments.address, arguments.pid) as (address, pid):
        if arguments.replay is not None:
            return asyncio.run(_replay(address, arguments.replay))
        return _fuzz(address, pid, arguments)


@contextmanager
def _server(address: str | None, pid: int | None) -> Iterator[tuple[str, int | None]]:
    if address is not None:
        yield address, pid
        return
    from tests.reference import make_served_reference  # takes seconds

    with TemporaryDirectory() as directory:
        make_served_reference(Path(directory), "maverick")
        with a_server(Path(directory)) as server:
            yield server


def _fuzz(address: str, pid: int | None, arguments: argparse.Namespace) -> int:
    print(f"seed {arguments.seed}: {arguments.requests} requests to each of {len(METHODS)} methods", flush=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("requests"), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=arguments.requests * len(METHODS))
        report = asyncio.run(
            fuzz(address, arguments.requests, arguments.seed, pid=pid, told=lambda: progress.advance(task))
        )
    print(*(f"{count:8}  {status}" for status, count in report.statuses.most_common()), sep="\n")
    print(f"{report.good_streams:8}  good streams")
    if report.resident_bytes is not None:
        warm, end = (size >> 20 for size in report.resident_bytes)
        print(f"memory of the server: {warm} MiB after warm-up, {end} MiB at the end")
    for index, (method, what, raw) in enumerate(report.faults):
        arguments.failures.mkdir(exist_ok=True)
        file = arguments.failures / f"{arguments.seed}-{index}{method.replace('/', '-')}"
        file.write_bytes(raw)
        print(f"FAULT {what}: {file}")
    if not report.memory_is_flat:
        print("FAULT the server's memory grew")
    return 1 if report.faults or not report.memory_is_flat else 0


async def _replay(address: str, file: Path) -> int:
    method = next(method for method in METHODS if file.name.endswith(method.replace("/", "-")))
    async with grpc.aio.insecure_channel(address) as channel:
        print(f"{method}: {await status_of(channel, method, file.read_bytes())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

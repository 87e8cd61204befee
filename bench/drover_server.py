"""A real Drover deployment for the benchmark: `drover serve` on a generated file, with a Ray of its own."""

import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench.errors import BenchError
from bench.process import ROOT, START_TIMEOUT_S, end, last_lines
from cluster.free_ports import free_ports

NAMESPACE = "drover-bench"
# Eight shards share two cores in a benchmark: a heart may miss some beats.
PATIENT_MS = 5000


@dataclass(frozen=True)
class ClusterShape:
    """What the two cores are shared out to."""

    router_threads: int = 2
    shards: int = 1
    shard_threads: int = 2

    def __str__(self) -> str:
        shards = "shard" if self.shards == 1 else "shards"
        return f"router with {self.router_threads} threads, {self.shards} {shards} with {self.shard_threads}"


def deployment(
    checkpoint: Path,
    shape: ClusterShape,
    max_running: int,
    grpc_port: int,
    http_port: int,
) -> dict[str, Any]:
    """The deployment file's contents."""
    return {
        "checkpoint": str(checkpoint.resolve()),
        "ray": {"namespace": NAMESPACE, "num_cpus": 4},  # reservations, not cores
        "router": {"cpus": 0.5, "threads": shape.router_threads},
        "shards": {"count": shape.shards, "cpus": 0.1, "threads": shape.shard_threads},
        "links": {"dead_after_ms": PATIENT_MS},
        "autoscale": {"paused": True},  # what is measured stays as it is
        "engine": {"max_running": max_running, "max_waiting": 4096},
        "frontend": {"grpc_port": grpc_port, "http_port": http_port},
    }


@contextmanager
def serving(
    checkpoint: Path,
    shape: ClusterShape,
    max_running: int,
    work: Path,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
) -> Iterator[str]:
    """A server that answers; gives its address. It and its Ray have ended when the block is left. Raises BenchError.

    max_running: requests computed at once. work: where its file and its log go. changes: keys of the
    file's sections that are to be otherwise.
    """
    grpc_port, http_port = free_ports(2)
    file, log = work / "drover.yaml", work / "drover.log"
    content = deployment(checkpoint, shape, max_running, grpc_port, http_port)
    for section, keys in (changes or {}).items():
        content[section] = content.get(section, {}) | dict(keys)
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "serve", str(file)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            cwd=ROOT,
            start_new_session=True,
        )
    try:
        wait_until_served(process, log)
        yield f"127.0.0.1:{grpc_port}"
    finally:
        end(process, signal.SIGINT)


def wait_until_served(process: subprocess.Popen[bytes], log: Path) -> None:
    """Return once its stdout says so. Raises BenchError if it ends, or takes too long."""
    assert process.stdout is not None
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        readable, _, _ = select.select([process.stdout], [], [], max(deadline - time.monotonic(), 0))
        if not readable:
            raise BenchError(f"drover serve was not ready within {START_TIMEOUT_S:.0f} s; its log is {log}")
        line = process.stdout.readline()
        if not line:
            raise BenchError(f"drover serve ended by itself; {last_lines(log)}")
        if b"is served on" in line:
            return

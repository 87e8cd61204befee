"""`drover serve` in processes of its own, for tests: a deployment file, and nothing left running afterwards."""

import os
import signal
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from cluster.config import DeploymentConfig
from cluster.deployment_file import deployment_of, read_deployment
from cluster.free_ports import free_ports
from tests.command import Screen
from tests.processes import processes_with, wait_until

NAMESPACE = "drover-lifecycle"
MARK = "DROVER_TEST_MARK"
# A Ray of its own, a process for each part, and weights; also where importing torch takes seconds.
START_S = 180.0


@contextmanager
def marked_environment() -> Iterator[dict[str, str]]:
    """An environment by which every process that descends from a command is known; none may outlive the block."""
    value = uuid.uuid4().hex
    yield os.environ | {MARK: value}
    try:
        wait_until(lambda: not processes_with(f"{MARK}={value}"))
    except AssertionError:
        raise AssertionError(f"left running: {processes_with(f'{MARK}={value}')}") from None


def write_deployment_file(path: Path, checkpoint: Path) -> Path:
    grpc_port, http_port = free_ports(2)
    raw = {
        "checkpoint": str(checkpoint),
        "ray": {"namespace": NAMESPACE, "num_cpus": 2},
        # All processes of two Rays share two cores in these tests; a shard's heart may miss some beats.
        "links": {"dead_after_ms": 3000},
        "frontend": {"grpc_port": grpc_port, "http_port": http_port},
    }
    path.write_text(yaml.safe_dump(raw))
    return path


def assert_ends_cleanly(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """A signal stops a `drover serve` once it serves: it says so, exits with 0, and leaves no trace on stderr."""
    assert process.stdout is not None
    assert process.stderr is not None
    screen = Screen(process.stdout.fileno())
    screen.read_until(b"Ctrl-C", START_S)
    process.send_signal(number)
    screen.read_until(b"stopped", START_S)
    assert process.wait(START_S) == 0
    assert b"Traceback" not in process.stderr.read()


def load_deployment(path: Path, overrides: Sequence[str] = ()) -> DeploymentConfig:
    """As `drover serve` does."""
    return deployment_of(read_deployment(path), path, overrides)


def address_in(deployment_file: Path) -> str:
    return f"127.0.0.1:{yaml.safe_load(deployment_file.read_text())['frontend']['grpc_port']}"


def other_ports() -> tuple[str, ...]:
    grpc_port, http_port = free_ports(2)
    return ("--set", f"frontend.grpc_port={grpc_port}", "--set", f"frontend.http_port={http_port}")

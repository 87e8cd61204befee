"""For every test."""

import os
import signal
import uuid
from collections.abc import Iterator

import pytest
import torch

from frontend.template_process import TEMPLATE_PROCESS
from tests.processes import processes_with, wait_until

# Several torch threads in one process crawl while other processes use the same cores, as the cluster tests' do.
TORCH_THREADS = 1
torch.set_num_threads(TORCH_THREADS)

# Who starts the tests in a shell's background has them ignore Ctrl-C, and so would every command that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _torch_threads() -> None:
    """Actors that run in the tests' process set their own number; the next test must not find it."""
    torch.set_num_threads(TORCH_THREADS)


@pytest.fixture(scope="session", autouse=True)
def _no_process_outlives_the_tests() -> Iterator[None]:
    """Every process that descends from this one inherits a mark of this session's own, also when its parent is gone."""
    name, value = "DROVER_TEST_SESSION", uuid.uuid4().hex
    os.environ[name] = value

    def left() -> dict[int, str]:
        # The standard library's own helper stays until this process ends.
        marked = processes_with(f"{name}={value}").items()
        return {pid: command for pid, command in marked if "multiprocessing.resource_tracker" not in command}

    def nothing_is_left() -> bool:
        remaining.clear()
        remaining.update(left())
        return not remaining

    remaining: dict[int, str] = {}
    yield
    TEMPLATE_PROCESS.close()
    try:
        wait_until(nothing_is_left)
    except AssertionError:
        names = "; ".join(f"process {pid}: {command}" for pid, command in sorted(remaining.items()))
        pytest.fail(f"what these tests started outlives them: {names}")

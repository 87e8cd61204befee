"""Real processes: who descends from whom, who lives, and what a mark tells."""

import os
import signal
import subprocess
import sys
import time

from bench.chaos.processes import below, has_mark, lives, monotonic_of, processes, send
from tests.processes import wait_until

MARK = "DROVER_CHAOS_TEST"
CHILD = "import subprocess, sys; print('up', flush=True); subprocess.run(['sleep', '60'])"


def test_a_process_and_its_children_are_found_and_ended() -> None:
    command = [sys.executable, "-c", CHILD]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {MARK: "7"}) as process:
        assert process.stdout is not None
        process.stdout.readline()
        wait_until(lambda: [child.command for child in below([process.pid])] == ["sleep"])
        [child] = below([process.pid])
        assert child.pid in [found.pid for found in below([os.getpid()])]
        assert child.parent == process.pid
        assert has_mark(child.pid, f"{MARK}=7")
        assert not has_mark(child.pid, f"{MARK}=8")
        assert lives(child.pid)
        assert send(child.pid, signal.SIGKILL)
        process.wait()
    assert not lives(child.pid)
    assert not send(process.pid, signal.SIGKILL)
    assert process.pid not in [found.pid for found in processes()]


def test_a_moment_of_the_wall_clock_is_one_of_the_monotonic() -> None:
    assert abs(monotonic_of(time.time()) - time.monotonic()) < 0.5

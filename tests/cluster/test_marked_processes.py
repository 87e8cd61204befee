"""Whatever carries a mark is found and ended, and nothing else."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.marked_processes import VARIABLE, end_left_over, end_marked, left_over, mark_of_this_process
from tests.processes import PATIENCE_S, wait_until

# Becomes a new program again and again; while it does, Linux shows no environment of it.
NO_SESSION = -1
AGAIN = 'exec /bin/sh -c "$0" "$0"'
RESTLESS = ["/bin/sh", "-c", AGAIN, AGAIN]
ASLEEP = [sys.executable, "-SEc", "import threading; threading.Event().wait()"]


@contextmanager
def started(command: list[str], mark: str) -> "Iterator[subprocess.Popen[bytes]]":
    process = subprocess.Popen(command, env=os.environ | {VARIABLE: mark}, stdin=subprocess.DEVNULL)
    try:
        wait_until(lambda: VARIABLE.encode() in environment_of(process))
        yield process
    finally:
        process.kill()
        process.wait()


def environment_of(process: "subprocess.Popen[bytes]") -> bytes:
    with open(f"/proc/{process.pid}/environ", "rb") as file:
        return file.read()


def test_a_process_that_becomes_another_program_is_not_missed() -> None:
    for _ in range(25):  # a single look misses one of ten
        with started(RESTLESS, "restless-1") as process:
            end_marked("restless-1", NO_SESSION)
            assert process.wait(PATIENCE_S) == -9


def test_only_processes_with_this_mark_are_ended() -> None:
    mark = mark_of_this_process()
    with started(ASLEEP, mark) as mine, started(ASLEEP, f"{mark}0") as other:
        end_marked(mark, NO_SESSION)
        assert mine.wait(PATIENCE_S) == -9
        assert other.poll() is None


def test_a_process_without_its_environment_is_known_by_its_session() -> None:
    alone = f"import subprocess; print(subprocess.Popen({ASLEEP}, env={{}}, stdout=subprocess.DEVNULL).pid)"
    parent = subprocess.run(
        [sys.executable, "-SEc", alone], start_new_session=True, stdout=subprocess.PIPE, check=True, timeout=PATIENCE_S
    )
    child = Path(f"/proc/{int(parent.stdout)}")
    assert child.exists()
    end_marked("nobody-1", session=int((child / "stat").read_text().rpartition(")")[2].split()[3]))
    wait_until(lambda: not child.exists())


def test_what_is_left_over_is_what_has_outlived_its_serve() -> None:
    with started(ASLEEP, mark_of_this_process()) as kept, started(ASLEEP, f"{os.getpid()}-1") as lost:
        assert lost.pid in left_over()
        assert kept.pid not in left_over()
        assert lost.pid in end_left_over()
        assert lost.wait(PATIENCE_S) == -9
        assert kept.poll() is None

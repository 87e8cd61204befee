"""The processes that descend from this one, wherever they went: to find them, and to end them all.

A subreaper adopts its descendants' orphans: a process whose parent was killed does not get away.
Linux only, like all of Drover.
"""

import ctypes
import os
import signal
import time
from pathlib import Path

_SET_CHILD_SUBREAPER = 36  # prctl(2)


def adopt_orphans() -> None:
    """From now on, descendants whose parent ends become children of this process."""
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(process_id: int | None = None) -> list[int]:
    """Process ids of everything that descends from a process, by default this one, and lives."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # pid (command) state parent ...; the command may hold anything, also parentheses
            state, parent, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue  # it ended in the meantime
        if state != "Z":
            children.setdefault(int(parent), []).append(int(entry.name))
    found, unseen = [], [process_id or os.getpid()]
    while unseen:
        born = children.get(unseen.pop(), [])
        found += born
        unseen += born
    return found


def end_descendants(timeout_s: float = 20.0) -> None:
    """Kill all descendants, and those that they still start. Needs adopt_orphans to have been called."""
    deadline_s = time.monotonic() + timeout_s
    while (alive := descendants()) and time.monotonic() < deadline_s:
        for process_id in alive:
            try:
                os.kill(process_id, signal.SIGKILL)
            except ProcessLookupError:
                pass
        reap()
        time.sleep(0.01)  # Linux tells of children only, not of theirs
    reap()


def reap(but: int | None = None) -> None:
    """Let go of children that have ended. but: one whose status somebody else waits for."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid == but:
            return
        os.waitpid(ended.si_pid, 0)

"""The processes that a `drover serve` has started, known by a mark in their environment.

Whatever they start inherits the mark, and keeps it when its parent is gone. So all can be found and
ended, and nobody else's. A process that has overwritten its environment, as some of Ray's do to
change their name, is known by its parent. The mark names the `drover serve`, by process id and
start time: what carries the mark of one that is gone is left over. Plain Python without Ray.
"""

import os
import signal
import time
from pathlib import Path

VARIABLE = "DROVER_SERVE"


def mark_of_this_process() -> str:
    """The mark for what this process starts."""
    started = _start_time(os.getpid())
    return f"{os.getpid()}-{started}"


# A process shows no environment while it becomes another program, which takes milliseconds on a busy machine.
_LOOKS_WITHOUT_ANY = 5


def end_marked(mark: str, timeout_s: float = 20.0) -> None:
    """Kill every process with this mark but this one, and those that they still start."""
    deadline_s = time.monotonic() + timeout_s
    looks_left = _LOOKS_WITHOUT_ANY
    while looks_left and time.monotonic() < deadline_s:
        alive = _marked().get(mark, [])
        _kill(alive)
        looks_left = _LOOKS_WITHOUT_ANY if alive else looks_left - 1
        time.sleep(0.01)  # Linux tells of children only, not of theirs


def left_over() -> list[int]:
    """Processes whose `drover serve` is gone, though they should have ended with it."""
    return [pid for mark, pids in _marked().items() if not lives(mark) for pid in pids]


def end_left_over() -> list[int]:
    """Kill them, and return their process ids."""
    ended = left_over()
    _kill(ended)
    return ended


def _marked() -> dict[str, list[int]]:
    """Process ids by mark, of those that this user may look into; without this process and the dead."""
    mark_of: dict[int, str] = {}
    parent_of: dict[int, int] = {}
    prefix = f"{VARIABLE}=".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            marks = [line for line in (entry / "environ").read_bytes().split(b"\0") if line.startswith(prefix)]
        except OSError:
            continue  # another user's, or it has just ended
        if (stat := _stat(int(entry.name))) is not None:
            parent_of[int(entry.name)] = int(stat[0])
            if marks:
                mark_of[int(entry.name)] = marks[0].removeprefix(prefix).decode(errors="replace")
    found: dict[str, list[int]] = {}
    for process_id in parent_of:
        ancestor: int | None = process_id
        while ancestor in parent_of and ancestor not in mark_of:
            ancestor = parent_of[ancestor]
        if ancestor in mark_of:
            found.setdefault(mark_of[ancestor], []).append(process_id)
    return found


def lives(mark: str) -> bool:
    """Whether the process that made this mark still runs."""
    process_id, _, started = mark.partition("-")
    return process_id.isdigit() and str(_start_time(int(process_id))) == started


def _start_time(process_id: int) -> int | None:
    """When it started, in clock ticks since the system did; None if it has ended. Ids are used again."""
    stat = _stat(process_id)
    return None if stat is None else int(stat[18])


def _stat(process_id: int) -> list[str] | None:
    """What /proc tells of a process, from its parent's id on (proc_pid_stat(5)); None if it has ended."""
    try:
        # pid (command) state ...; the command may hold anything, also parentheses
        state, *fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields


def _kill(process_ids: list[int]) -> None:
    for process_id in process_ids:
        try:
            os.kill(process_id, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass

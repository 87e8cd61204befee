"""The processes that a `drover serve` has started, known by a mark in their environment.

Whatever they start inherits the mark, and keeps it when its parent is gone. So all can be found and
ended, and nobody else's. Some of Ray's processes have overwritten their environment, to change
their name; they are known by their session. The mark names the `drover serve`, by process id and
start time: what carries the mark of one that is gone is left over. Plain Python without Ray.
"""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

VARIABLE = "DROVER_SERVE"


def mark_of_this_process() -> str:
    """The mark for what this process starts."""
    started = _start_time(os.getpid())
    return f"{os.getpid()}-{started}"


# A process shows no environment while it becomes another program, which takes milliseconds on a busy machine.
_LOOKS_WITHOUT_ANY = 5


def end_marked(mark: str, session: int, timeout_s: float = 20.0) -> None:
    """Kill every process with this mark or of this session but this one, and those that they still start."""
    deadline_s = time.monotonic() + timeout_s
    looks_left = _LOOKS_WITHOUT_ANY
    while looks_left and time.monotonic() < deadline_s:
        alive = [process_id for process_id, marked, of in _processes() if marked == mark or of == session]
        _kill(alive)
        looks_left = _LOOKS_WITHOUT_ANY if alive else looks_left - 1
        time.sleep(0.01)  # Linux tells of children only, not of theirs


def left_over() -> list[int]:
    """Processes whose `drover serve` is gone, though they should have ended with it."""
    return [process_id for process_id, mark, _ in _processes() if mark is not None and not lives(mark)]


def end_left_over() -> list[int]:
    """Kill them, and return their process ids."""
    ended = left_over()
    _kill(ended)
    return ended


def _processes() -> Iterator[tuple[int, str | None, int]]:
    """The id, mark and session of each that this user may look into; without this process and the dead."""
    prefix = f"{VARIABLE}=".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            marks = [line for line in (entry / "environ").read_bytes().split(b"\0") if line.startswith(prefix)]
        except OSError:
            continue  # another user's, or it has just ended
        if (stat := _stat(int(entry.name))) is not None:
            mark = marks[0].removeprefix(prefix).decode(errors="replace") if marks else None
            yield int(entry.name), mark, int(stat[2])


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

"""Finding the processes of one deployment in /proc, by the mark in their environment, or by Ray's titles."""

import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    """title: its command line, which Ray's workers replace by what they are."""

    pid: int
    parent: int
    command: str
    title: str


def processes() -> Iterator[Process]:
    """Everything that runs now and is no zombie."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                command = (entry / "comm").read_text().strip()
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue  # it ended meanwhile
            if title:
                yield Process(int(entry.name), int(parent), command, title)


def below(parents: Collection[int]) -> list[Process]:
    """Everything that descends from these processes."""
    everything, known = list(processes()), set(parents)
    while found := {process.pid for process in everything if process.parent in known} - known:
        known |= found
    return [process for process in everything if process.pid in known - set(parents)]


def has_mark(pid: int, mark: str) -> bool:
    """Whether NAME=VALUE is in the environment that it started with."""
    try:
        return mark.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def lives(pid: int) -> bool:
    """Whether it runs, or is stopped; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def send(pid: int, number: int) -> bool:
    """Send a signal; whether the process was there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def monotonic_of(wall_s: float) -> float:
    """time.monotonic at a moment of time.time, such as a file's."""
    return wall_s - time.time() + time.monotonic()

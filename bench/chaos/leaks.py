"""What a deployment holds: processes, threads, descriptors, shared memory, ports. After many faults as before."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

from bench.chaos.processes import below
from bench.chaos.system import System

WAIT_S = 60.0
"""Leftovers of the last fault may take so long to go: Ray reaps workers, and Serve replaces replicas."""
SPARE = {"threads": 24, "descriptors": 40, "ports": 4, "processes": 0, "shared memory": 0, "actors": 0}
"""What one part may hold more than before: pools of threads and connections grow to a bound with use."""

Held = Mapping[str, Mapping[str, int]]
"""By what it is and which part holds it: how many."""


def look(system: System) -> dict[str, dict[str, int]]:
    """What each part holds now, and the machine."""
    held: dict[str, dict[str, int]] = {kind: {} for kind in SPARE}
    for name, pids in system.everything().items():
        held["processes"][name] = len(pids)
        for pid in pids:
            held["threads"][name] = held["threads"].get(name, 0) + _count(f"/proc/{pid}/task")
            held["descriptors"][name] = held["descriptors"].get(name, 0) + _count(f"/proc/{pid}/fd")
            held["ports"][name] = held["ports"].get(name, 0) + _listening(pid)
    held["shared memory"]["machine"] = _count("/dev/shm")
    held["actors"]["all"] = sum(process.title.startswith("ray::") for process in below(system.of_kind("raylet")))
    return held


def more(before: Held, after: Held) -> list[str]:
    """What is held more than before, beyond SPARE, in words."""
    found = []
    for kind, by_part in after.items():
        for part, count in by_part.items():
            had = before.get(kind, {}).get(part, 0)
            if count > had + SPARE[kind]:
                found.append(f"{kind} of {part}: {had} before, {count} now")
    return found


def wait_for_none(before: Held, system: System) -> list[str]:
    """What is left more than before, once nothing is or WAIT_S has passed."""
    deadline_s = time.monotonic() + WAIT_S
    while (found := more(before, look(system))) and time.monotonic() < deadline_s:
        time.sleep(1.0)  # nothing tells when it is gone
    return found


def _count(folder: str) -> int:
    try:
        return len(os.listdir(folder))
    except OSError:
        return 0


def _listening(pid: int) -> int:
    """How many of its descriptors are listening TCP sockets."""
    try:
        mine = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
        lines = [line for name in ("tcp", "tcp6") for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()]
    except OSError:
        return 0
    fields = [line.split() for line in lines]
    return sum(entry[3] == "0A" and f"socket:[{entry[9]}]" in mine for entry in fields if len(entry) > 9)

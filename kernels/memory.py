"""How much memory a device has free: the machine's, or what a control group leaves of it."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

NO_LIMIT = 2**63 - 1


def free_bytes(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes that can be allocated on `device` now; None if the system does not tell.

    On a CPU: the machine's available memory, or what a cgroup's limit leaves if that is less.
    Without /proc/meminfo, unused pages are counted, and page cache is not. root: where /proc and
    /sys are.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for later counts as taken
        return int(torch.cuda.mem_get_info(device)[0])
    available_kib = _fields(root / "proc/meminfo").get("MemAvailable:")
    if available_kib is not None:
        available = available_kib * 1024
    elif "SC_AVPHYS_PAGES" in os.sysconf_names:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return None
    return max(0, min(available, _cgroup_bytes_left(root)))


def peak_bytes(device: torch.device, work: Callable[[], object]) -> int | None:
    """Bytes that `work` allocates on a GPU at its peak; None on a CPU, where it is not run."""
    if device.type != "cuda":
        return None
    before = int(torch.cuda.memory_allocated(device))
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return int(torch.cuda.max_memory_allocated(device)) - before


def _cgroup_bytes_left(root: Path) -> int:
    """The least that this process's memory cgroup and its ancestors leave.

    Cgroups v1 and v2, at the usual mounts.

    In a container, /proc/self/cgroup may give the host's path. The container's limit is then at
    the mount itself.
    """
    left, mount = [NO_LIMIT], root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = mount, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = mount / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = top / path.lstrip("/")
        left += [_bytes_left(group, *names) for group in (own, *own.parents) if group.is_relative_to(top)]
    return min(left)


def _bytes_left(group: Path, limit: str, used: str, inactive_file: str) -> int:
    """The limit minus the working set, which is usage without inactive page cache.

    Kubernetes uses the same, usage - inactive_file: cAdvisor's container_memory_working_set_bytes.
    """
    try:
        limit_bytes, used_bytes = (int((group / name).read_text()) for name in (limit, used))
    except (OSError, ValueError):  # no such group, or "max"
        return NO_LIMIT
    return limit_bytes - max(0, used_bytes - _fields(group / "memory.stat").get(inactive_file, 0))


def _fields(path: Path) -> dict[str, int]:
    """name -> number of a file with one of these a line; empty if it cannot be read."""
    return {name: int(number) for name, number, *_ in map(str.split, _lines(path))}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []

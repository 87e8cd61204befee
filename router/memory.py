"""How many bytes the KV cache gets."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint.errors import DroverError
from router.kv_layout import KvLayout

GIB = 2**30
DEFAULT_KV_BYTES = GIB
NO_LIMIT = 2**63 - 1


class NoRoom(DroverError):
    """The KV cache that was asked for does not fit beside the weights, or nobody can tell how much does."""


@dataclass(frozen=True)
class KvBudget:
    """`bytes`, or `share` (0 to 1) of what is free on the device once the weights are loaded, never both.

    With neither, DEFAULT_KV_BYTES.
    """

    bytes: int | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        assert self.bytes is None or self.share is None

    def resolve(self, layout: KvLayout, free_bytes: int | None, weight_bytes: int) -> int:
        """Bytes for the cache, a whole number of units. Raises NoRoom, with the key that was set and the arithmetic.

        free_bytes: none where it is not known; a share is then refused, and a number of bytes believed.
        Example: with 24 GiB free and share 0.5 the cache gets 12 GiB; with bytes = 32 GiB it is refused.
        """
        if self.share is not None:
            if free_bytes is None:
                raise NoRoom(
                    f"engine.kv_share is {self.share:g}, but this system does not tell how much memory is free; "
                    "set engine.kv_bytes instead"
                )
            key, wanted = f"engine.kv_share of {self.share:g}", int(self.share * free_bytes)
        elif self.bytes is not None:
            key, wanted = "engine.kv_bytes", self.bytes
        else:
            key, wanted = "the default of engine.kv_bytes", DEFAULT_KV_BYTES
        free = "an unknown number of bytes" if free_bytes is None else _size(free_bytes)
        have = f"{free} are free beside {_size(weight_bytes)} of weights"
        if free_bytes is not None and wanted > free_bytes:
            raise NoRoom(f"{key} asks for {_size(wanted)} of KV cache, but {have}; set it lower or free some memory")
        least = layout.units(1) * layout.unit_bytes
        if wanted < least:
            raise NoRoom(
                f"{key} comes to {_size(wanted)} of KV cache; a single block of {layout.block_tokens} tokens needs "
                f"{_size(least)}, and {have}"
            )
        return wanted // layout.unit_bytes * layout.unit_bytes


def free_bytes(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes that can be allocated on `device` now; none if the system does not tell.

    On a CPU: what the machine has available or, if that is less, what is left of a cgroup's limit. Where there is no
    /proc/meminfo, pages that are unused, page cache not counted. root: where /proc and /sys are.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available_kib = _fields(root / "proc/meminfo").get("MemAvailable:")
    if available_kib is not None:
        available = available_kib * 1024
    elif "SC_AVPHYS_PAGES" in os.sysconf_names:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return None
    return max(0, min(available, _cgroup_bytes_left(root)))


def _cgroup_bytes_left(root: Path) -> int:
    """What this process's memory cgroup and those above it leave, by the tightest limit; v1 and v2, mounted as usual.

    In a container, the path in /proc/self/cgroup may be the host's; the container's limit is then at the mount itself.
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
    """The limit minus the working set: what is used but for page cache that the kernel gives up first.

    That is what Kubernetes goes by: container_memory_working_set_bytes of cAdvisor, which is usage - inactive_file.
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


def _size(count: int) -> str:
    for unit, name in ((GIB, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count} bytes"

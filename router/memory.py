"""How many bytes the KV cache gets."""

from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint.errors import DroverError
from router.kv_layout import KvLayout

GIB = 2**30


class NoRoom(DroverError):
    """The KV cache that was configured does not fit beside the weights."""


@dataclass(frozen=True)
class KvBudget:
    """Either `bytes`, or `share` (0 to 1) of what is free on the router's device once its weights are loaded."""

    bytes: int | None = None
    share: float | None = None

    def resolve(self, layout: KvLayout, free_bytes: int, weight_bytes: int) -> int:
        """Bytes for the cache, a whole number of units. Raises NoRoom, with the arithmetic.

        Example: with 24 GiB free and share 0.5 the cache gets 12 GiB; with bytes = 32 GiB it is refused.
        """
        wanted = self.bytes if self.bytes is not None else int((self.share or 0.0) * free_bytes)
        name = "engine.kv_bytes" if self.bytes is not None else f"engine.kv_share of {self.share:g}"
        have = f"{_gib(free_bytes)} are free beside the router's weights ({_gib(weight_bytes)})"
        if wanted > free_bytes:
            raise NoRoom(f"{name} asks for {_gib(wanted)} of KV cache, but {have}; lower it or give the router more")
        least = layout.units(1) * layout.unit_bytes
        if wanted < least:
            raise NoRoom(
                f"{name} comes to {wanted} bytes of KV cache; a single block of {layout.block_tokens} tokens needs "
                f"{least} bytes, and {have}"
            )
        return wanted // layout.unit_bytes * layout.unit_bytes


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on `device` now; on a CPU, what the machine or this process's cgroup has left."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    fields = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    available = next(int(field[1]) * 1024 for field in fields if field[0] == "MemAvailable:")
    return min(available, _cgroup_bytes_left())


def _cgroup_bytes_left(root: Path = Path("/sys/fs/cgroup")) -> int:
    try:
        limit, used = (root / name for name in ("memory.max", "memory.current"))
        return max(0, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return 2**63 - 1


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB"

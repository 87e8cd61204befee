"""The size of the KV cache, from what the deployment file asks for and what memory is free."""

from dataclasses import dataclass

from checkpoint.errors import DroverError
from router.schedule.kv_layout import KvLayout
from router.schedule.limits import DEFAULT_KV_BYTES, GIB

RESERVE_BYTES = GIB // 2
"""On a GPU, for what measuring a step leaves out.

Sampling 64 rows of 202,048 logits takes about 300 MB. The rest is for libraries and fragmentation.
"""


class NoRoom(DroverError):
    """The KV cache does not fit beside the weights, or a share is set and free memory is unknown."""


@dataclass(frozen=True)
class KvBudget:
    """What the deployment file asks for: `bytes` or `share`, never both.

    With neither, DEFAULT_KV_BYTES.

    share: fraction (0 to 1) of the device's memory that is free once the weights are loaded.
    """

    bytes: int | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        assert self.bytes is None or self.share is None

    def resolve(
        self, layout: KvLayout, free_bytes: int | None, weight_bytes: int, step_bytes: int | None = None
    ) -> int:
        """The cache's size in bytes, a whole number of units.

        Raises NoRoom, naming the key and the sizes.

        free_bytes: None if unknown. Then a share is refused, and a number of bytes is taken as given.
        step_bytes: what a step takes beside the cache, which then stays free together with RESERVE_BYTES.
        Example: with 24 GiB free, a share of 0.5 gives 12 GiB, and bytes = 32 GiB is refused. With
        step_bytes = 1.5 GiB, the share gives 11 GiB.
        """
        kept = ""
        if free_bytes is not None and step_bytes is not None:
            free_bytes = max(0, free_bytes - step_bytes - RESERVE_BYTES)
            kept = f" and {_size(step_bytes + RESERVE_BYTES)} for a step"
        if self.share is not None:
            if free_bytes is None:
                raise NoRoom(
                    f"engine.kv_share is {self.share:g}, but this system does not report free memory; "
                    "set engine.kv_bytes instead"
                )
            key, wanted = f"engine.kv_share of {self.share:g}", int(self.share * free_bytes)
        elif self.bytes is not None:
            key, wanted = "engine.kv_bytes", self.bytes
        else:
            key, wanted = "the default of engine.kv_bytes", DEFAULT_KV_BYTES
        free = "an unknown number of bytes" if free_bytes is None else _size(free_bytes)
        have = f"{free} are free beside {_size(weight_bytes)} of weights{kept}"
        if free_bytes is not None and wanted > free_bytes:
            raise NoRoom(f"{key} asks for {_size(wanted)} of KV cache, but {have}; set it lower or free some memory")
        least = layout.units(1) * layout.unit_bytes
        if wanted < least:
            raise NoRoom(
                f"{key} comes to {_size(wanted)} of KV cache; a single block of {layout.block_tokens} tokens needs "
                f"{_size(least)}, and {have}"
            )
        return wanted // layout.unit_bytes * layout.unit_bytes


def _size(count: int) -> str:
    for unit, name in ((GIB, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count} bytes"

"""How many bytes the KV cache gets."""

from dataclasses import dataclass

from checkpoint.errors import DroverError
from router.schedule.kv_layout import KvLayout
from router.schedule.limits import DEFAULT_KV_BYTES, GIB


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


def _size(count: int) -> str:
    for unit, name in ((GIB, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count} bytes"

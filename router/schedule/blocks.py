"""Who holds which units of the KV pool: reference counts, and blocks kept for whoever has the same prefix next.

A block whose content is complete is published under a key made of its tokens and all before them. When nobody holds it
any more, it stays until its memory is needed, the longest unused going first. Plain Python.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(eq=False)
class Block:
    """units: rows of the pool's tensors. key: what it is published under, if it is. holders: sequences that use it."""

    units: tuple[int, ...]
    holders: int = 1
    key: Hashable | None = None


class BlockPool:
    """`num_units` units of KV memory."""

    def __init__(self, num_units: int) -> None:
        self.num_units = num_units
        self._free = list(range(num_units - 1, -1, -1))  # the lowest goes first
        self._published: dict[Hashable, Block] = {}
        self._idle: OrderedDict[Hashable, Block] = OrderedDict()  # published, held by nobody; longest unused first
        self._idle_units = 0

    @property
    def available_units(self) -> int:
        """Units that can be allocated now, if need be at the expense of blocks that nobody holds."""
        return len(self._free) + self._idle_units

    @property
    def used_units(self) -> int:
        """Units of blocks that somebody holds."""
        return self.num_units - self.available_units

    @property
    def cached_units(self) -> int:
        """Units of blocks that nobody holds, kept for their content."""
        return self._idle_units

    def allocate(self, num_units: int) -> Block | None:
        """A block with one holder and any content; None if not so many units are available."""
        if num_units > self.available_units:
            return None
        while len(self._free) < num_units:
            self._evict()
        rest = len(self._free) - num_units
        units = tuple(reversed(self._free[rest:]))
        del self._free[rest:]
        return Block(units)

    def hold(self, block: Block) -> None:
        """One more holder."""
        if block.holders == 0:
            assert block.key is not None
            del self._idle[block.key]
            self._idle_units -= len(block.units)
        block.holders += 1

    def release(self, block: Block) -> None:
        """One holder less. Release a sequence's last block first: the start of a prefix should live longest."""
        assert block.holders > 0
        block.holders -= 1
        if block.holders:
            return
        if block.key is None:
            self._free += reversed(block.units)
        else:
            self._idle[block.key] = block
            self._idle_units += len(block.units)

    def publish(self, block: Block, key: Hashable) -> None:
        """Let `find` give this block to others. If another has the same content already, that one stays the known."""
        assert block.holders > 0
        if block.key is None and key not in self._published:
            block.key = key
            self._published[key] = block

    def find(self, key: Hashable) -> Block | None:
        """The block published under `key`; call `hold` before anything is allocated."""
        return self._published.get(key)

    def _evict(self) -> None:
        key, block = self._idle.popitem(last=False)
        self._idle_units -= len(block.units)
        del self._published[key]
        self._free += reversed(block.units)

"""The pool of KV blocks: reference counts and the prefix cache. Plain Python.

A full block is published under a key made of its tokens and all tokens before them. Once no
sequence holds it, it stays in the pool as a cached block. When memory is needed, cached blocks are
evicted, least recently used first.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(eq=False)
class Block:
    """units: indices into the pool's tensors.

    holders: sequences that use it. key: set once it is published.
    """

    units: tuple[int, ...]
    holders: int = 1
    key: Hashable | None = None


class BlockPool:
    """`num_units` units of KV memory."""

    def __init__(self, num_units: int) -> None:
        self.num_units = num_units
        self._free = list(range(num_units - 1, -1, -1))  # a stack: the lowest unit is on top
        self._published: dict[Hashable, Block] = {}
        self._cached: OrderedDict[Hashable, Block] = OrderedDict()  # cached, least recently used first
        self._cached_units = 0

    @property
    def available_units(self) -> int:
        """Units that can be allocated now: free ones, and those of cached blocks, which are
        evicted."""
        return len(self._free) + self._cached_units

    @property
    def used_units(self) -> int:
        """Units of blocks that a sequence holds."""
        return self.num_units - self.available_units

    @property
    def cached_units(self) -> int:
        """Units of blocks that no sequence holds, kept for their content."""
        return self._cached_units

    def allocate(self, num_units: int) -> Block | None:
        """A block with one holder and undefined content; None if fewer units are available.

        Evicts cached blocks.
        """
        if num_units > self.available_units:
            return None
        while len(self._free) < num_units:
            self._evict()
        rest = len(self._free) - num_units
        units = tuple(reversed(self._free[rest:]))
        del self._free[rest:]
        return Block(units)

    def hold(self, block: Block) -> None:
        """Add a holder."""
        if block.holders == 0:
            assert block.key is not None
            del self._cached[block.key]
            self._cached_units -= len(block.units)
        block.holders += 1

    def release(self, block: Block) -> None:
        """Remove a holder.

        Release a sequence's last block first, so that the start of a prefix stays cached longest.
        """
        assert block.holders > 0
        block.holders -= 1
        if block.holders:
            return
        if block.key is None:
            self._free += reversed(block.units)
        else:
            self._cached[block.key] = block
            self._cached_units += len(block.units)

    def publish(self, block: Block, key: Hashable) -> None:
        """Let `find` return this block.

        If a block with this key exists already, that one stays published.
        """
        assert block.holders > 0
        if block.key is None and key not in self._published:
            block.key = key
            self._published[key] = block

    def find(self, key: Hashable) -> Block | None:
        """The block published under `key`, or None.

        Call `hold` before the next `allocate`, which may evict it.
        """
        return self._published.get(key)

    def unpublish(self, key: Hashable) -> None:
        """Never find the block under `key` again. Sequences that hold it keep it."""
        block = self._published.pop(key, None)
        if block is None:
            return
        block.key = None
        if block.holders == 0:
            del self._cached[key]
            self._cached_units -= len(block.units)
            self._free += reversed(block.units)

    def _evict(self) -> None:
        key, block = self._cached.popitem(last=False)
        self._cached_units -= len(block.units)
        del self._published[key]
        self._free += reversed(block.units)

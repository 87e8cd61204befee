"""The blocks of one sequence: allocated as it grows, shared with sequences of the same prefix."""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from router.schedule.blocks import Block, BlockPool
from router.schedule.kv_layout import KvLayout


@dataclass(frozen=True)
class TableEntry:
    """Entry `index` of tables first_table, first_table + 1, ... is now units[0], units[1], ..."""

    first_table: int
    index: int
    units: tuple[int, ...]


class PrefixKeys:
    """The keys of a sequence's full blocks.

    Two keys are equal only if all tokens up to the block's end are equal.

    Key i is BLAKE2b over key i - 1 and the tokens of block i. The hash is cryptographic, so nobody
    can construct a different prompt with the same key.
    """

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._keys: list[bytes] = []

    def of(self, token_ids: Sequence[int], num_blocks: int) -> list[bytes]:
        """The first num_blocks keys.

        Since the last call, token_ids may have grown but not changed.
        """
        size = self._block_tokens
        while len(self._keys) < num_blocks:
            first = len(self._keys) * size
            tokens = array("q", token_ids[first : first + size])
            assert len(tokens) == size
            before = self._keys[-1] if self._keys else b""
            self._keys.append(hashlib.blake2b(before + tokens.tobytes(), digest_size=24).digest())
        return self._keys[:num_blocks]


class BlockTable:
    """The blocks of one running sequence.

    new_entries: changes since the caller last cleared it; the KV cache copies them into its tensors.
    publishes: whether full blocks go into the prefix cache.
    """

    def __init__(self, layout: KvLayout, pool: BlockPool, keys: PrefixKeys, publishes: bool = True) -> None:
        self.new_entries: list[TableEntry] = []
        self._layout = layout
        self._pool = pool
        self._keys = keys
        self._publishes = publishes
        self._global: list[Block] = []  # entry i: the global layers of block i
        self._chunk: list[Block] = []  # entry i: the chunked layers of block i of the current chunk
        self._published = 0

    @property
    def units(self) -> int:
        """Units held, including those shared with other sequences."""
        layout = self._layout
        return layout.global_units * len(self._global) + layout.chunked_units * len(self._chunk)

    def adopt_prefix(self, token_ids: Sequence[int]) -> int:
        """Hold the published blocks that match the start of token_ids.

        Returns how many tokens they hold.

        The last token always stays to be computed, because the next token is sampled from its
        logits. Global layers need every block from the start. Chunked layers need only the blocks
        of the chunk where computing continues.
        """
        layout, pool = self._layout, self._pool
        assert not self._global
        keys = self._keys.of(token_ids, (len(token_ids) - 1) // layout.block_tokens)
        found_global = _leading(pool, [("global", key) for key in keys])
        per_chunk = layout.chunk_tokens // layout.block_tokens
        chunk_start = len(found_global) // per_chunk * per_chunk
        if layout.chunked_units:
            found_chunk = _leading(pool, [("chunked", key) for key in keys[chunk_start : len(found_global)]])
            found_global = found_global[: chunk_start + len(found_chunk)]
        else:
            found_chunk = []
        for block in found_global + found_chunk:
            pool.hold(block)
        self._global, self._chunk = found_global, found_chunk
        self._published = len(found_global)
        self.new_entries += [TableEntry(0, i, block.units) for i, block in enumerate(found_global)]
        self.new_entries += [TableEntry(layout.global_units, i, block.units) for i, block in enumerate(found_chunk)]
        return len(found_global) * layout.block_tokens

    def grow(self, first: int, length: int) -> int:
        """Allocate blocks for tokens first..first+length-1, all in one chunk.

        Returns how many have room now.
        """
        layout = self._layout
        assert first % layout.chunk_tokens + length <= layout.chunk_tokens
        while len(self._global) < layout.blocks(first + length):
            if layout.global_units + layout.chunked_units > self._pool.available_units:
                break
            self._append(self._global, 0, layout.global_units)
            if layout.chunked_units:
                self._append(self._chunk, layout.global_units, layout.chunked_units)
        return min(length, len(self._global) * layout.block_tokens - first)

    def mark_computed(self, token_ids: Sequence[int], count: int) -> list[bytes]:
        """The keys and values of positions below `count` are stored.

        Publishes full blocks; returns their keys.

        At a chunk's end the chunk's blocks are released.
        """
        layout = self._layout
        full = count // layout.block_tokens if self._publishes else 0
        per_chunk = layout.chunk_tokens // layout.block_tokens
        keys = self._keys.of(token_ids, full)[self._published :] if full > self._published else []
        for index, key in enumerate(keys, self._published):
            self._pool.publish(self._global[index], ("global", key))
            if layout.chunked_units:
                self._pool.publish(self._chunk[index % per_chunk], ("chunked", key))
            self._published = index + 1
        if count % layout.chunk_tokens == 0:
            self._release(self._chunk)
        return keys

    def unpublish(self, token_ids: Sequence[int]) -> None:
        """Take all of the sequence's blocks, those of its past chunks included, from the prefix cache."""
        for key in self._keys.of(token_ids, self._published):
            self._pool.unpublish(("global", key))
            self._pool.unpublish(("chunked", key))

    def release(self) -> None:
        """Release all blocks."""
        self._release(self._chunk)
        self._release(self._global)
        self.new_entries.clear()

    def _append(self, blocks: list[Block], first_table: int, num_units: int) -> None:
        block = self._pool.allocate(num_units)
        assert block is not None
        self.new_entries.append(TableEntry(first_table, len(blocks), block.units))
        blocks.append(block)

    def _release(self, blocks: list[Block]) -> None:
        while blocks:
            self._pool.release(blocks.pop())


def _leading(pool: BlockPool, keys: Sequence[tuple[str, bytes]]) -> list[Block]:
    found = []
    for key in keys:
        block = pool.find(key)
        if block is None:
            break
        found.append(block)
    return found

"""How keys and values are cut into blocks. Arithmetic only, no tensors.

A block holds `block_tokens` consecutive positions of one sequence. What it stores for the global layers is kept as long
as the sequence lives; what it stores for the chunked layers only until their attention chunk ends. Both are made of
units of one size (so many layers at so many positions), so that one pool serves both: memory goes where it is needed.

Example, Scout: 12 global and 36 chunked layers make units of 12 layers; a block takes 1 unit for its global layers and
3 for its chunked ones. A sequence of 1,000,000 tokens holds 15,625 units of the former and at most 384 of the latter.
"""

import math
from dataclasses import dataclass

from checkpoint.config import ModelConfig

MAX_BLOCK_TOKENS = 64


@dataclass(frozen=True)
class LayerLocation:
    """Where a layer's keys and values are: in the units of block table `table`, at `index` within each unit."""

    table: int
    index: int


@dataclass(frozen=True)
class KvLayout:
    """block_tokens divides chunk_tokens, so no block crosses an attention chunk's border.

    A sequence has one block table per unit of a block: `global_units` tables for the global layers, whose entry i is
    block i, then `chunked_units` tables for the chunked ones, whose entry i is block i of the current chunk.
    unit_bytes: keys and values of `layers_per_unit` layers at block_tokens positions.
    """

    block_tokens: int
    chunk_tokens: int
    global_units: int
    chunked_units: int
    layers_per_unit: int
    unit_bytes: int
    locations: tuple[LayerLocation, ...]

    @classmethod
    def of(cls, config: ModelConfig, bytes_per_value: int, max_block_tokens: int = MAX_BLOCK_TOKENS) -> "KvLayout":
        """The layout of a model's cache; blocks are as large as max_block_tokens and the chunk size allow."""
        chunk = config.attention_chunk_size
        block = max(size for size in range(1, min(max_block_tokens, chunk) + 1) if chunk % size == 0)
        chunked = sum(layer.is_chunked for layer in config.layers)
        per_unit = math.gcd(chunked, config.num_layers - chunked)
        global_units = (config.num_layers - chunked) // per_unit
        seen = {True: 0, False: 0}
        places = []
        for layer in config.layers:
            number = seen[layer.is_chunked]
            seen[layer.is_chunked] += 1
            first = global_units if layer.is_chunked else 0
            places.append(LayerLocation(first + number // per_unit, number % per_unit))
        unit_bytes = 2 * config.num_kv_heads * config.head_dim * bytes_per_value * per_unit * block
        return cls(block, chunk, global_units, chunked // per_unit, per_unit, unit_bytes, tuple(places))

    @property
    def num_tables(self) -> int:
        return self.global_units + self.chunked_units

    def blocks(self, positions: int) -> int:
        """Blocks that hold so many positions."""
        return -(-positions // self.block_tokens)

    def units(self, positions: int) -> int:
        """Units that one sequence of `positions` tokens holds at most, at any time up to then."""
        in_chunk = min(positions, self.chunk_tokens)
        return self.global_units * self.blocks(positions) + self.chunked_units * self.blocks(in_chunk)

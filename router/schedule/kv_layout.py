"""How the KV cache is cut into blocks and units. Arithmetic only, no tensors.

A block holds `block_tokens` consecutive positions of one sequence. Its global layers are kept as
long as the sequence lives, its chunked layers only until their attention chunk ends. So each kind
is stored in units of its own. All units have the same size, `layers_per_unit` layers at
`block_tokens` positions, and come from one pool.

Example, Scout: it has 12 global and 36 chunked layers, so a unit holds 12 layers. A block takes 1
unit for its global layers and 3 for its chunked ones. A sequence of 1,000,000 tokens holds 15,625
global and at most 384 chunked units.
"""

import math
from dataclasses import dataclass

from checkpoint.config import ModelConfig

MAX_BLOCK_TOKENS = 64


@dataclass(frozen=True)
class LayerLocation:
    """A layer's keys and values are at `index` within each unit of block table `table`."""

    table: int
    index: int


@dataclass(frozen=True)
class KvLayout:
    """Sizes of blocks and units, and each layer's location in them.

    block_tokens: positions in a block. It divides chunk_tokens, so no block crosses an attention
    chunk's border.
    global_units, chunked_units: units of one block for its global and its chunked layers. A
    sequence has one block table for each. In the first `global_units` tables entry i is block i of
    the sequence; in the others it is block i of the current chunk.
    unit_bytes: keys and values of `layers_per_unit` layers at block_tokens positions.
    locations: by layer.
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
        """A model's layout, with the largest block that max_block_tokens and the chunk size allow."""
        chunk = config.attention_chunk_size
        block = max(size for size in range(1, min(max_block_tokens, chunk) + 1) if chunk % size == 0)
        chunked = sum(layer.is_chunked for layer in config.layers)
        per_unit = math.gcd(chunked, config.num_layers - chunked)
        global_units = (config.num_layers - chunked) // per_unit
        seen = {True: 0, False: 0}
        locations = []
        for layer in config.layers:
            nth = seen[layer.is_chunked]
            seen[layer.is_chunked] += 1
            first_table = global_units if layer.is_chunked else 0
            locations.append(LayerLocation(first_table + nth // per_unit, nth % per_unit))
        unit_bytes = 2 * config.num_kv_heads * config.head_dim * bytes_per_value * per_unit * block
        return cls(block, chunk, global_units, chunked // per_unit, per_unit, unit_bytes, tuple(locations))

    @property
    def num_tables(self) -> int:
        return self.global_units + self.chunked_units

    def blocks(self, positions: int) -> int:
        """Blocks for this many positions."""
        return -(-positions // self.block_tokens)

    def units(self, positions: int) -> int:
        """The most units that a sequence holds at any time while it grows to `positions` tokens."""
        in_chunk = min(positions, self.chunk_tokens)
        return self.global_units * self.blocks(positions) + self.chunked_units * self.blocks(in_chunk)

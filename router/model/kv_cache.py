"""The block tables of all running sequences, and the pool that they point into.

Keys and values never leave the router, so losing a shard loses none of them.

Legend: T tokens of a step, N spans, B blocks of a sequence.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels.upload import upload
from router.schedule.block_table import TableEntry
from router.schedule.kv_layout import KvLayout


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one sequence in a step, all in one attention chunk.

    table_row: see SequenceState.
    """

    table_row: int
    first_position: int
    length: int


@dataclass(frozen=True)
class TablePlan:
    """Where a step's tokens are stored, and what its spans see, in the layers of one block table.

    unit_T, offset_T: each token's unit, and its position within it. Span n sees the first
    keys_N[n] positions of blocks_NB[n], its own last tokens included. Entries beyond those mean
    nothing. keys_N stays on the host; the rest is on the device.
    """

    unit_T: torch.Tensor
    offset_T: torch.Tensor
    blocks_NB: torch.Tensor
    keys_N: np.ndarray


@dataclass(frozen=True)
class KvPools:
    """The keys and values of all units, one tensor for each layer of a unit.

    Axes in which order, the heads that made them know (`HeadAttention.new_pools`); nobody else
    looks inside.
    """

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]


class KvCache:
    """Pools of keys and values, and the block tables of up to max_sequences sequences."""

    def __init__(self, layout: KvLayout, max_sequences: int, pools: KvPools, device: torch.device) -> None:
        """device: where plans are needed, as the pools are."""
        self.layout = layout
        self.pools = pools
        self._device = device
        self._tables = np.zeros((max_sequences, layout.num_tables, 1), np.int32)

    def assign(self, table_row: int, entries: Iterable[TableEntry]) -> None:
        """Note changes in a sequence's block tables."""
        for entry in entries:
            while entry.index >= self._tables.shape[2]:
                self._tables = np.concatenate([self._tables, np.zeros_like(self._tables)], axis=2)
            last_table = entry.first_table + len(entry.units)
            self._tables[table_row, entry.first_table : last_table, entry.index] = entry.units

    def plan(self, spans: Sequence[Span]) -> list[TablePlan]:
        """One plan for each block table."""
        layout = self.layout
        row_N = np.array([span.table_row for span in spans])
        first_N = np.array([span.first_position for span in spans])
        length_N = np.array([span.length for span in spans])
        in_chunk_N = first_N % layout.chunk_tokens
        assert np.all(in_chunk_N + length_N <= layout.chunk_tokens), "a span crosses an attention chunk's border"
        row_T = np.repeat(row_N, length_N)
        nth_T = np.arange(length_N.sum()) - np.repeat(np.cumsum(length_N) - length_N, length_N)
        arrays, keys_of_tables = [], []
        for first_table, num_tables, begin_N in (
            (0, layout.global_units, first_N),
            (layout.global_units, layout.chunked_units, in_chunk_N),
        ):
            position_T = np.repeat(begin_N, length_N) + nth_T  # in the sequence, or in its chunk
            block_T = position_T // layout.block_tokens
            offset_T = position_T % layout.block_tokens
            keys_N = (begin_N + length_N).astype(np.int32)
            num_blocks = layout.blocks(int(keys_N.max()))
            for table in range(first_table, first_table + num_tables):
                unit_T = self._tables[row_T, table, block_T].astype(np.int64)
                arrays += [unit_T, offset_T, self._tables[row_N, table, :num_blocks]]
                keys_of_tables.append(keys_N)
        tensors = iter(upload(arrays, self._device))
        return [TablePlan(next(tensors), next(tensors), next(tensors), keys_N) for keys_N in keys_of_tables]

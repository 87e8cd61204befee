"""The keys and values of all running sequences, in blocks. They never leave the router: losing a shard loses nothing.

Legend: T tokens of a step, U units of the pool, P positions of a block, K key/value heads, C = head_dim columns,
N spans, B blocks of a sequence.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from checkpoint.config import ModelConfig
from router.schedule.block_table import TableEntry
from router.schedule.kv_layout import KvLayout


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one sequence in a step, all in one attention chunk. row: of the sequence's block tables."""

    row: int
    first_position: int
    length: int


@dataclass(frozen=True)
class TablePlan:
    """Where a step's tokens are stored, and what its spans see, in the layers of one block table.

    unit_T, slot_T: each token's unit and its place there. Span n sees the first keys_N[n] positions of blocks_NB[n],
    its own last tokens included; entries beyond those are meaningless.
    """

    unit_T: torch.Tensor
    slot_T: torch.Tensor
    blocks_NB: np.ndarray
    keys_N: np.ndarray


class KvCache:
    """The pool's tensors, and the block tables of up to max_sequences sequences, one row each.

    k_UKPC and v_UKCP have one tensor for each layer of a unit. Values are stored transposed, so that both products with
    queries and those with weights run along the last axis.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: KvLayout,
        num_units: int,
        max_sequences: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        heads, columns, positions = config.num_kv_heads, config.head_dim, layout.block_tokens
        # Zeros, not whatever was there: a masked position's weight of 0 times NaN would be NaN.
        self.k_UKPC = [
            _zeros((num_units, heads, positions, columns), dtype, device) for _ in range(layout.layers_per_unit)
        ]
        self.v_UKCP = [
            _zeros((num_units, heads, columns, positions), dtype, device) for _ in range(layout.layers_per_unit)
        ]
        self.layout = layout
        self.num_kv_heads = heads
        self._device = device
        self._tables = np.zeros((max_sequences, layout.num_tables, 1), np.int32)

    def assign(self, row: int, entries: Iterable[TableEntry]) -> None:
        """Note changes in a sequence's block tables."""
        for entry in entries:
            while entry.index >= self._tables.shape[2]:
                self._tables = np.concatenate([self._tables, np.zeros_like(self._tables)], axis=2)
            last_table = entry.first_table + len(entry.units)
            self._tables[row, entry.first_table : last_table, entry.index] = entry.units

    def plan(self, spans: Sequence[Span]) -> list[TablePlan]:
        """One plan for each block table."""
        layout = self.layout
        row_N = np.array([span.row for span in spans])
        first_N = np.array([span.first_position for span in spans])
        length_N = np.array([span.length for span in spans])
        in_chunk_N = first_N % layout.chunk_tokens
        assert np.all(in_chunk_N + length_N <= layout.chunk_tokens), "a span crosses an attention chunk's border"
        row_T = np.repeat(row_N, length_N)
        nth_T = np.arange(length_N.sum()) - np.repeat(np.cumsum(length_N) - length_N, length_N)
        plans = []
        for first_table, num_tables, begin_N in (
            (0, layout.global_units, first_N),
            (layout.global_units, layout.chunked_units, in_chunk_N),
        ):
            place_T = np.repeat(begin_N, length_N) + nth_T
            block_T = place_T // layout.block_tokens
            slot_T = torch.from_numpy(place_T % layout.block_tokens).to(self._device)
            keys_N = (begin_N + length_N).astype(np.int32)
            num_blocks = layout.blocks(int(keys_N.max()))
            for table in range(first_table, first_table + num_tables):
                unit_T = torch.from_numpy(self._tables[row_T, table, block_T].astype(np.int64)).to(self._device)
                plans.append(TablePlan(unit_T, slot_T, self._tables[row_N, table, :num_blocks], keys_N))
        return plans

    def store(self, index: int, plan: TablePlan, k_TKC: torch.Tensor, v_TKC: torch.Tensor) -> None:
        """Keep a step's keys and values in layer `index` of the plan's units. Storing them again is harmless."""
        self.k_UKPC[index][plan.unit_T, :, plan.slot_T] = k_TKC
        self.v_UKCP[index][plan.unit_T, :, :, plan.slot_T] = v_TKC

    def gather(self, index: int, plan: TablePlan, span: int, num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(k_KSC, v_KSC): a copy of the first num_keys positions that span number `span` sees, in order."""
        blocks = torch.from_numpy(plan.blocks_NB[span, : self.layout.blocks(num_keys)]).to(self._device)
        k_KSC = self.k_UKPC[index][blocks].transpose(0, 1).flatten(1, 2)[:, :num_keys]
        v_KSC = self.v_UKCP[index][blocks].permute(1, 0, 3, 2).contiguous().flatten(1, 2)[:, :num_keys]
        return k_KSC, v_KSC


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Of pages that the system zeroes when they are first touched: torch would touch them all now.
    count = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(count, np.uint8)).view(dtype).view(shape)

"""The whole model in this process: a router model over LocalLinks, as many shards as asked for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from checkpoint.tensors import Checkpoint
from kernels.kernels import Kernels
from router import local
from router.model.kv_cache import Span
from router.model.llama4 import Model
from router.schedule.block_table import BlockTable, PrefixKeys
from router.schedule.blocks import BlockPool
from router.schedule.kv_layout import KvLayout


def load_model(
    directory: Path,
    *,
    num_shards: int = 1,
    dtype: torch.dtype = torch.float32,
    kernels: Kernels | None = None,
    **config_changes: Any,
) -> Model:
    """config_changes: fields of ModelConfig to falsify, for tests that must then fail."""
    checkpoint = Checkpoint.open(directory)
    return local.load_model(
        checkpoint,
        replace(checkpoint.config, **config_changes),
        dtype,
        num_shards=num_shards,
        kernels=kernels,
    )


class OneSequence:
    """A model with a cache of its own for one sequence of at most max_positions tokens."""

    def __init__(self, model: Model, max_positions: int, max_block_tokens: int = 64) -> None:
        self._model = model
        layout = KvLayout.of(model.config, model.dtype.itemsize, max_block_tokens)
        self._blocks = BlockTable(layout, BlockPool(layout.units(max_positions)), PrefixKeys(layout.block_tokens))
        self._cache = model.new_cache(layout, layout.units(max_positions), 1)
        self._token_ids: list[int] = []

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """[T, V]: append these tokens, and return the logits at each of them."""
        chunk, logits = self._model.config.attention_chunk_size, []
        while token_ids:
            first = len(self._token_ids)
            part, token_ids = token_ids[: chunk - first % chunk], token_ids[chunk - first % chunk :]
            assert self._blocks.grow(first, len(part)) == len(part)
            self._cache.assign(0, self._blocks.new_entries)
            self._blocks.new_entries.clear()
            x_TD = self._model.forward(part, [Span(0, first, len(part))], self._cache, range(len(part)))
            self._token_ids += part
            self._blocks.mark_computed(self._token_ids, len(self._token_ids))
            logits.append(self._model.logits(x_TD))
        return torch.cat(logits)


def prefill_logits(model: Model, token_ids: list[int], limit: int = 512) -> torch.Tensor:
    """[T, V]: the logits at every position, from steps of at most `limit` tokens."""
    sequence = OneSequence(model, len(token_ids))
    return torch.cat([sequence.logits(token_ids[i : i + limit]) for i in range(0, len(token_ids), limit)])


def greedy(model: Model, token_ids: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    """`count` tokens chosen one by one, and the logits [count, V] that each was chosen from."""
    sequence = OneSequence(model, len(token_ids) + count)
    logits = [sequence.logits(token_ids)[-1]]
    chosen = [int(logits[0].argmax())]
    for _ in range(count - 1):
        logits.append(sequence.logits([chosen[-1]])[0])
        chosen.append(int(logits[-1].argmax()))
    return chosen, torch.stack(logits)

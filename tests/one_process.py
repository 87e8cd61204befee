"""The whole model in this process: a router model over LocalLinks, as many shards as asked for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from checkpoint.tensors import Checkpoint
from frontend import one_process
from router.model import Model


def load_model(
    directory: Path, *, num_shards: int = 1, dtype: torch.dtype = torch.float32, **config_changes: Any
) -> Model:
    """config_changes: fields of ModelConfig to falsify, for tests that must then fail."""
    checkpoint = Checkpoint.open(directory)
    return one_process.load_model(
        checkpoint, replace(checkpoint.config, **config_changes), dtype, num_shards=num_shards
    )


def prefill_logits(model: Model, token_ids: list[int], limit: int = 512) -> torch.Tensor:
    """[T, V]: the logits at every position, from steps of at most `limit` tokens."""
    cache, logits = model.new_cache(len(token_ids)), []
    for first in range(0, len(token_ids), limit):
        tokens = token_ids[first : first + limit]
        x_RD = model.forward(tokens, model.spans(cache, first, len(tokens)), range(len(tokens)))
        logits.append(model.logits(x_RD))
    return torch.cat(logits)


def greedy(model: Model, token_ids: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    """`count` tokens chosen one by one, and the logits [count, V] that each was chosen from."""
    cache = model.new_cache(len(token_ids) + count)
    last = model.logits(model.forward(token_ids, model.spans(cache, 0, len(token_ids)), [len(token_ids) - 1]))
    chosen, logits = [int(last.argmax())], [last[0]]
    for position in range(len(token_ids), len(token_ids) + count - 1):
        last = model.logits(model.forward([chosen[-1]], model.spans(cache, position, 1), [0]))
        chosen.append(int(last.argmax()))
        logits.append(last[0])
    return chosen, torch.stack(logits)

"""The whole model in this process: a router model over LocalLinks, as many shards as asked for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from checkpoint.tensors import Checkpoint
from experts.link import LocalLink
from experts.placement import even_placement
from experts.shard import load_shard
from router.attention import Span
from router.dispatch import Dispatcher
from router.model import Model
from router.weights import WeightReader

CPU = torch.device("cpu")


def load_model(
    directory: Path, *, num_shards: int = 1, dtype: torch.dtype = torch.float32, **config_changes: Any
) -> Model:
    """config_changes: fields of ModelConfig to falsify, for tests that must then fail."""
    checkpoint = Checkpoint.open(directory)
    config = replace(checkpoint.config, **config_changes)
    placement = even_placement(config.moe_layers, config.num_experts, num_shards)
    links = [
        LocalLink(load_shard(checkpoint, placement.version, placement.experts_of(shard), dtype, CPU))
        for shard in range(num_shards)
    ]
    return Model(config, WeightReader(checkpoint, dtype, CPU), Dispatcher(placement, links))


def spans_of(model: Model, cache: object, first: int, length: int, limit: int = 512) -> list[Span]:
    """Cut `length` tokens from position `first` at attention chunk borders, and after `limit` tokens."""
    chunk, spans = model.config.attention_chunk_size, []
    while length:
        step = min(length, chunk - first % chunk, limit)
        spans.append(Span(cache, first, step))  # type: ignore[arg-type]
        first, length = first + step, length - step
    return spans


def prefill_logits(model: Model, token_ids: list[int], limit: int = 512) -> torch.Tensor:
    """[T, V]: the logits at every position, span by span."""
    cache, logits = model.new_cache(len(token_ids)), []
    for span in spans_of(model, cache, 0, len(token_ids), limit):
        tokens = token_ids[span.first_position : span.first_position + span.length]
        logits.append(model.forward(tokens, [span], range(span.length)))
    return torch.cat(logits)


def greedy(model: Model, token_ids: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    """`count` tokens chosen one by one, and the logits [count, V] that each was chosen from."""
    cache = model.new_cache(len(token_ids) + count)
    for span in spans_of(model, cache, 0, len(token_ids)):
        tokens = token_ids[span.first_position : span.first_position + span.length]
        last = model.forward(tokens, [span], [span.length - 1])
    chosen, logits = [int(last.argmax())], [last[0]]
    for position in range(len(token_ids), len(token_ids) + count - 1):
        last = model.forward([chosen[-1]], [Span(cache, position, 1)], [0])
        chosen.append(int(last.argmax()))
        logits.append(last[0])
    return chosen, torch.stack(logits)

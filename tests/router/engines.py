"""Engines over a real model, requests for them, and what comes out."""

from collections.abc import Iterable
from typing import Any

from router.engine import Engine
from router.kv_layout import KvLayout
from router.model import Model
from router.request import FinishReason, GenerationRequest, SamplingParams, TokenDelta
from router.scheduler import SchedulerLimits
from tests.reference import prompt

NUM_SHARDS = 3
MANY_STEPS = 2000


def make_engine(
    model: Model,
    *,
    max_running: int = 8,
    max_waiting: int = 100,
    max_step_tokens: int = 64,
    kv_positions: int = 2000,
    max_block_tokens: int = 4,
    prefix_cache: bool = True,
) -> Engine:
    """kv_positions: memory for one sequence of so many tokens."""
    layout = KvLayout.of(model.config, model.dtype.itemsize, max_block_tokens)
    kv_bytes = layout.units(kv_positions) * layout.unit_bytes
    limits = SchedulerLimits(max_running, max_waiting, max_step_tokens, kv_bytes, prefix_cache)
    return Engine(model, limits, max_block_tokens=max_block_tokens)


def greedy(name: str, prompt_token_ids: Iterable[int], max_tokens: int = 12, **sampling: Any) -> GenerationRequest:
    params = SamplingParams(max_tokens, **{"temperature": 0.0, **sampling})
    return GenerationRequest(name, tuple(prompt_token_ids), params)


def drawn(name: str, prompt_token_ids: Iterable[int], max_tokens: int = 12, **sampling: Any) -> GenerationRequest:
    return greedy(name, prompt_token_ids, max_tokens, **{"temperature": 1.0, "seed": 20260401, **sampling})


def run_to_end(engine: Engine) -> list[TokenDelta]:
    """All deltas of all requests, in order."""
    deltas = []
    for _ in range(MANY_STEPS):
        if not engine.has_work:
            return deltas
        deltas += engine.step()
    raise AssertionError(f"not done after {MANY_STEPS} steps")


def tokens_of(deltas: Iterable[TokenDelta], name: str) -> list[int]:
    return [token_id for delta in deltas if delta.request_id == name for token_id in delta.token_ids]


def finish_of(deltas: Iterable[TokenDelta], name: str) -> FinishReason | None:
    [last] = [delta for delta in deltas if delta.request_id == name and delta.is_last]
    return last.finish_reason


def alone(model: Model, request: GenerationRequest) -> list[int]:
    engine = make_engine(model)
    engine.submit(request)
    return tokens_of(run_to_end(engine), request.request_id)


COMPANY = [
    greedy(f"{length} tokens", prompt(length, seed=length), max_tokens)
    for length, max_tokens in ((1, 20), (5, 3), (16, 12), (17, 1), (40, 12), (33, 7))
]

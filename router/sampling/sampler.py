"""Chooses the next token of every sequence in a step, all at once.

The noise (router/sampling/noise.py) depends on seed and position only. So a request draws the same
tokens whatever else is in the batch. It also continues with the same tokens when another router
takes over after some are made.

Legend: R rows (sequences), V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from router.request import TokenLogprobs
from router.sampling.candidates import candidates, draw
from router.sampling.logprobs import token_logprobs
from router.sampling.noise import uniform
from router.sampling.penalties import penalised
from router.sampling.state import SamplingState


@dataclass(frozen=True)
class SampledToken:
    """logprobs is None unless the request asked for them."""

    token_id: int
    logprobs: TokenLogprobs | None


def sample(logits_RV: torch.Tensor, states: Sequence[SamplingState], positions: Sequence[int]) -> list[SampledToken]:
    """One token per row. positions: the new token's position in its sequence, prompt included.

    The states are not changed. The caller calls `SamplingState.append` when it takes the token.
    """
    params = [state.params for state in states]
    logits_RV = logits_RV.float()
    penalised_RV = penalised(logits_RV, states)
    drawn = [row for row, p in enumerate(params) if p.temperature > 0]
    # max() is three times as fast as argmax(), and of equal logits both take the lowest token id.
    chosen = [0] * len(params) if len(drawn) == len(params) else penalised_RV.max(dim=-1).indices.tolist()
    for found in candidates(penalised_RV, params, drawn):
        uniforms = [uniform(params[row].seed, positions[row]) for row in found.rows]
        for row, token_id in zip(found.rows, draw(found, uniforms), strict=True):
            chosen[row] = token_id
    logprobs: dict[int, TokenLogprobs] = {}
    asked = {row: p.logprobs for row, p in enumerate(params) if p.logprobs is not None}
    if asked:
        rows = list(asked)
        raw_RV = logits_RV if len(rows) == len(params) else logits_RV[rows]
        entries = token_logprobs(raw_RV, [chosen[row] for row in rows], list(asked.values()))
        logprobs = dict(zip(rows, entries, strict=True))
    return [SampledToken(token_id, logprobs.get(row)) for row, token_id in enumerate(chosen)]

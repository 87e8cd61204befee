"""Chooses the next token of every sequence in a step, all at once. A row that cannot be sampled fails alone.

The noise (router/sampling/noise.py) depends on seed and position only. So a request draws the same
tokens whatever else is in the batch. It also continues with the same tokens when another router
takes over after some are made.

Legend: R rows (sequences), V vocabulary.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from router.request import TokenLogprobs
from router.sampling.candidates import candidates, draw, rows_of
from router.sampling.logprobs import RowFailed, finite_rows, token_logprobs
from router.sampling.noise import uniform
from router.sampling.penalties import penalised
from router.sampling.state import SamplingState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampledToken:
    """logprobs is None unless the request asked for them."""

    token_id: int
    logprobs: TokenLogprobs | None


def sample(
    logits_RV: torch.Tensor, states: Sequence[SamplingState], positions: Sequence[int]
) -> list[SampledToken | RowFailed]:
    """One token per row, or why that row has none.

    positions: the new token's position in its sequence, prompt included. A row that fails changes
    no other row's token. The states are not changed. The caller calls `SamplingState.append` when
    it takes the token.
    """
    logits_RV, failures = finite_rows(logits_RV.float())
    tokens: list[SampledToken | RowFailed]
    try:
        tokens = list(_sample(logits_RV, states, positions))
    except Exception:
        logger.exception("sampling %d rows failed; each is tried alone", len(states))
        tokens = [_sample_alone(logits_RV[row : row + 1], states[row], positions[row]) for row in range(len(states))]
    return [failures.get(row, token) for row, token in enumerate(tokens)]


def _sample_alone(logits_1V: torch.Tensor, state: SamplingState, position: int) -> SampledToken | RowFailed:
    try:
        return _sample(logits_1V, [state], [position])[0]
    except Exception as error:
        logger.exception("sampling a row failed")
        return RowFailed(f"sampling failed ({type(error).__name__}); the router's log says why")


def _sample(logits_RV: torch.Tensor, states: Sequence[SamplingState], positions: Sequence[int]) -> list[SampledToken]:
    params = [state.params for state in states]
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
        raw_RV = rows_of(logits_RV, rows)
        entries = token_logprobs(raw_RV, [chosen[row] for row in rows], list(asked.values()))
        logprobs = dict(zip(rows, entries, strict=True))
    return [SampledToken(token_id, logprobs.get(row)) for row, token_id in enumerate(chosen)]

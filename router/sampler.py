"""Chooses the next token of every sequence of a step at once.

Randomness is keyed by (seed, position) alone: the same request draws the same noise whatever else is in the batch,
and goes on drawing the same after it was resubmitted elsewhere with the tokens made so far.

Legend: R rows (sequences), V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from router.candidates import candidates, draw
from router.logprobs import token_logprobs
from router.penalties import penalised
from router.request import TokenLogprobs
from router.sampling_state import SamplingState

_MASK64 = 2**64 - 1


@dataclass(frozen=True)
class SampledToken:
    """logprobs is None unless the request asked for them."""

    token_id: int
    logprobs: TokenLogprobs | None


def sample(logits_RV: torch.Tensor, states: Sequence[SamplingState], positions: Sequence[int]) -> list[SampledToken]:
    """One token per row. positions: the place in its sequence (prompt included) that each row's token will take.

    The states are not told of it; `SamplingState.push` does that once the token is taken.
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


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but (seed, position): two rounds of splitmix64's finalizer."""
    mixed = mix64(mix64(seed) ^ (position * 0x9E3779B97F4A7C15 & _MASK64))
    return (mixed >> 11) / 2**53


def mix64(value: int) -> int:
    """The output function of splitmix64 (Steele, Lea, Flood 2014), a bijection of 64-bit integers."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK64
    return value ^ (value >> 31)

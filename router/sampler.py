"""Chooses the next token of every sequence of a step at once.

Randomness is keyed by (seed, position) alone: the same request draws the same noise whatever else is in the batch,
and goes on drawing the same after it was resubmitted elsewhere with the tokens made so far.

Legend: R rows (sequences), V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from router.request import SamplingParams, TokenLogprobs

_MASK64 = 2**64 - 1
_TINY = torch.finfo(torch.float32).tiny  # a request may ask for less, which float32 would round to zero


@dataclass(frozen=True)
class SampledToken:
    """logprobs is None unless the request asked for them."""

    token_id: int
    logprobs: TokenLogprobs | None


def sample(logits_RV: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[SampledToken]:
    """One token per row. positions: the place in its sequence (prompt included) that each row's token will take."""
    chosen_R = logits_RV.argmax(dim=-1)
    random_rows = [row for row, p in enumerate(params) if p.temperature > 0]
    if random_rows:
        drawn = [params[row] for row in random_rows]
        probabilities, token_ids = candidate_probabilities(logits_RV[random_rows], drawn)
        uniforms = [uniform(params[row].seed, positions[row]) for row in random_rows]
        chosen_R[random_rows] = _draw(probabilities, token_ids, uniforms)
    chosen = chosen_R.tolist()
    logprobs = _logprobs(logits_RV, chosen, params)
    return [SampledToken(token_id, logprobs.get(row)) for row, token_id in enumerate(chosen)]


def candidate_probabilities(
    logits_RV: torch.Tensor, params: Sequence[SamplingParams]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(probability, token id), both [R, V], most likely first: what may be drawn, and how likely; the rest is 0.

    Temperature first, then top_k, then top_p over what top_k left, as transformers' logits processors do, but for
    equal logits at the border of top_k: exactly k are kept, the lowest token ids. top_p keeps the smallest set of most
    likely tokens that reaches it.
    """
    device = logits_RV.device
    temperature_R1 = torch.tensor([max(p.temperature, _TINY) for p in params], device=device)[:, None]
    top_p_R1 = torch.tensor([max(p.top_p, _TINY) for p in params], device=device)[:, None]
    vocab = logits_RV.shape[-1]
    top_k_R1 = torch.tensor([min(p.top_k or vocab, vocab) for p in params], device=device)[:, None]
    sorted_RV, token_id_RV = logits_RV.sort(dim=-1, descending=True, stable=True)
    # Subtracting the largest logit first keeps a tiny temperature from overflowing.
    scaled_RV = (sorted_RV - sorted_RV[:, :1]) / temperature_R1
    scaled_RV[torch.arange(vocab, device=device)[None, :] >= top_k_R1] = -torch.inf
    probability_RV = torch.softmax(scaled_RV, dim=-1)
    likelier_RV = probability_RV.cumsum(dim=-1) - probability_RV  # mass before this token
    probability_RV[(likelier_RV >= top_p_R1) & (top_p_R1 < 1)] = 0.0
    probability_RV /= probability_RV.sum(dim=-1, keepdim=True)
    return probability_RV, token_id_RV


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but (seed, position): two rounds of splitmix64's finalizer."""
    mixed = _mix(_mix(seed) ^ (position * 0x9E3779B97F4A7C15 & _MASK64))
    return (mixed >> 11) / 2**53


def _mix(value: int) -> int:
    # The output function of splitmix64 (Steele, Lea, Flood 2014), a bijection of 64-bit integers.
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK64
    return value ^ (value >> 31)


def _draw(probability_RV: torch.Tensor, token_id_RV: torch.Tensor, uniforms: Sequence[float]) -> torch.Tensor:
    cumulative_RV = probability_RV.double().cumsum(dim=-1)
    target_R1 = (
        torch.tensor(uniforms, dtype=torch.float64, device=probability_RV.device)[:, None] * cumulative_RV[:, -1:]
    )
    # The first place whose cumulative probability exceeds the target: never one of probability zero.
    place_R1 = torch.searchsorted(cumulative_RV, target_R1, right=True)
    return token_id_RV.gather(1, place_R1)[:, 0]


def _logprobs(
    logits_RV: torch.Tensor, chosen: Sequence[int], params: Sequence[SamplingParams]
) -> dict[int, TokenLogprobs]:
    wanted = [row for row, p in enumerate(params) if p.logprobs is not None]
    if not wanted:
        return {}
    logprob_WV = torch.log_softmax(logits_RV[wanted].float(), dim=-1)
    most = max(params[row].logprobs or 0 for row in wanted)
    top_WN, top_id_WN = logprob_WV.topk(min(most, logits_RV.shape[-1]), dim=-1)
    result = {}
    for i, row in enumerate(wanted):
        count = params[row].logprobs or 0
        top = tuple(zip(top_id_WN[i, :count].tolist(), top_WN[i, :count].tolist(), strict=True))
        logprob = float(logprob_WV[i, chosen[row]])
        if top and logprob == top[0][1]:
            # Of several equally likely tokens the chosen one comes first, and is not cut off.
            others = tuple(entry for entry in top if entry[0] != chosen[row])
            top = ((chosen[row], logprob), *others)[:count]
        result[row] = TokenLogprobs(chosen[row], logprob, top)
    return result

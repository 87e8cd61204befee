"""Sampling states as requests with and without a past have them."""

from collections.abc import Sequence

from router.request import SamplingParams
from router.sampling.state import SamplingState


def state(
    params: SamplingParams, prompt: Sequence[int] = (), made: Sequence[int] = (), eos: Sequence[int] = ()
) -> SamplingState:
    """The state of a request that has made the tokens `made` so far."""
    result = SamplingState(params, prompt, eos)
    for token_id in made:
        result.append(token_id)
    return result


def states(params: Sequence[SamplingParams]) -> list[SamplingState]:
    return [state(p) for p in params]

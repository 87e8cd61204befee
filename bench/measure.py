"""From the times at which tokens came to the figures of the table. Pure arithmetic, the same for every system."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from bench.errors import BenchError
from bench.worker import Request, Stream


@dataclass(frozen=True)
class Round:
    """Two jobs over equally many new prompts: one that asks for a single token each, and one for many.

    prefill_s: until the last first token, in the job of single tokens. last_first_s: the same in the other job.
    total_s: until its last token. made: its tokens but for the first ones. ttft_ms, itl_ms: of its streams.
    """

    prompt_tokens: int
    made: int
    prefill_s: float
    last_first_s: float
    total_s: float
    ttft_ms: list[float]
    itl_ms: list[float]


@dataclass(frozen=True)
class Figures:
    """Tokens per second over all streams together, and what each stream saw; medians over rounds."""

    decode_tok_s: float
    prefill_tok_s: float
    ttft_ms_p50: float
    ttft_ms_p99: float
    itl_ms_p50: float
    itl_ms_p99: float
    decode_tok_s_min: float
    decode_tok_s_max: float
    rounds: int


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the values lie, interpolated between neighbours as numpy does.

    percentile([10, 20, 30, 40], 50) is 25: halfway between the second and the third.
    """
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def check_complete(system: str, requests: Sequence[Request], streams: Sequence[Stream]) -> None:
    """Raise BenchError unless every stream has exactly the tokens asked for: shorter ones would be other work."""
    refused = [stream.error for stream in streams if stream.error is not None]
    if refused:
        raise BenchError(f"{system} failed {len(refused)} requests: {refused[0]}")
    short = [
        (request.max_tokens, len(stream.token_ids))
        for request, stream in zip(requests, streams, strict=True)
        if len(stream.token_ids) != request.max_tokens
    ]
    if short:
        asked, got = short[0]
        raise BenchError(f"{system} ended {len(short)} streams early: the first has {got} of {asked} tokens")


def ttft_ms(requests: Sequence[Request], streams: Sequence[Stream]) -> list[float]:
    """Each stream's time from sending the request to its first token."""
    return [1e3 * (s.token_s[0] - r.at_s) for r, s in zip(requests, streams, strict=True)]


def itl_ms(streams: Sequence[Stream]) -> list[float]:
    """The times between a token and the next, of all streams together."""
    return [1e3 * (after - before) for s in streams for before, after in pairwise(s.token_s)]


def round_of(prefill: Sequence[Stream], requests: Sequence[Request], streams: Sequence[Stream]) -> Round:
    """What the two jobs of a round say. prefill: of the job of single tokens; the others are of the other job."""
    return Round(
        prompt_tokens=sum(len(request.token_ids) for request in requests),
        made=sum(len(stream.token_ids) - 1 for stream in streams),
        prefill_s=max(stream.token_s[0] for stream in prefill),
        last_first_s=max(stream.token_s[0] for stream in streams),
        total_s=max(stream.token_s[-1] for stream in streams),
        ttft_ms=ttft_ms(requests, streams),
        itl_ms=itl_ms(streams),
    )


def summary(rounds: Sequence[Round]) -> Figures:
    """The figures of one system at one concurrency.

        prefill_tok_s = prompt tokens / prefill_s
        decode_tok_s = streams * (tokens - 1) / (total_s - prefill_s)

    With 2 streams of 5 tokens, the last first token after 1 s and the last token after 5 s: 2 * 4 / (5 - 1) = 2.
    The prefill_s taken off is the median of all rounds, and never more than the same job's own time to its last first
    token: a pause of the machine in a prefill must not flatter decoding.
    """
    prefill_s = median(r.prefill_s for r in rounds)
    decode = [r.made / (r.total_s - min(prefill_s, r.last_first_s)) for r in rounds]
    return Figures(
        decode_tok_s=median(decode),
        prefill_tok_s=median(r.prompt_tokens / r.prefill_s for r in rounds),
        ttft_ms_p50=median(percentile(r.ttft_ms, 50) for r in rounds),
        ttft_ms_p99=median(percentile(r.ttft_ms, 99) for r in rounds),
        itl_ms_p50=median(percentile(r.itl_ms, 50) for r in rounds),
        itl_ms_p99=median(percentile(r.itl_ms, 99) for r in rounds),
        decode_tok_s_min=min(decode),
        decode_tok_s_max=max(decode),
        rounds=len(rounds),
    )

"""From the times at which tokens came to the figures of the table. Pure arithmetic, the same for every system."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bench.errors import BenchError
from bench.worker import Request, Stream


@dataclass(frozen=True)
class Figures:
    """One run: tokens per second over all streams, and what each stream saw, in milliseconds."""

    decode_tok_s: float
    prefill_tok_s: float
    ttft_ms_p50: float
    ttft_ms_p99: float
    itl_ms_p50: float
    itl_ms_p99: float


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
    return [1e3 * (after - before) for s in streams for before, after in zip(s.token_s, s.token_s[1:], strict=False)]


def figures(prefill: Sequence[Stream], requests: Sequence[Request], streams: Sequence[Stream]) -> Figures:
    """The figures of two closed-loop jobs over as many prompts: one of a single token, one of many.

    prefill: the job of a single token; it lasts until the last request's first token. The other lasts prefill_s longer
    than its decoding:
        prefill_tok_s = prompt tokens / prefill_s
        decode_tok_s = streams * (tokens - 1) / (until the last token - prefill_s)
    With 2 streams of 5 tokens, the first tokens after 1 s and the last after 5 s: 2 * 4 / (5 - 1) = 2 tokens/s.
    """
    prefill_s = max(stream.token_s[-1] for stream in prefill)
    total_s = max(stream.token_s[-1] for stream in streams)
    first_tokens, gaps = ttft_ms(requests, streams), itl_ms(streams)
    return Figures(
        decode_tok_s=sum(len(stream.token_ids) - 1 for stream in streams) / (total_s - prefill_s),
        prefill_tok_s=sum(len(request.token_ids) for request in requests) / prefill_s,
        ttft_ms_p50=percentile(first_tokens, 50),
        ttft_ms_p99=percentile(first_tokens, 99),
        itl_ms_p50=percentile(gaps, 50),
        itl_ms_p99=percentile(gaps, 99),
    )


def median_of(runs: Sequence[Figures]) -> Figures:
    """The median of each figure by itself."""
    return Figures(**{name: statistics.median(getattr(run, name) for run in runs) for name in Figures.__annotations__})

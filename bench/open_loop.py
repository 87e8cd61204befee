"""The open loop: requests of mixed lengths arrive at random times, whether or not earlier ones are done.

Goodput is what counts there: the requests per second that met both targets, over the time until the last one ended.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.measure import itl_ms, percentile
from bench.worker import Request, Stream
from bench.workload import prompts

# Tokens; each length is as likely as the others.
PROMPT_LENGTHS = (32, 64, 128, 256, 512)
OUTPUT_LENGTHS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Targets:
    """What a request must meet: its first token, and the mean time between its tokens."""

    ttft_ms: float = 1000.0
    itl_ms: float = 100.0


def poisson_schedule(seed: str, rate_per_s: float, duration_s: float) -> list[float]:
    """Arrival times in [0, duration_s): the gaps are exponential with mean 1 / rate_per_s. Same seed, same times."""
    rng, now_s = random.Random(seed), 0.0
    arrivals: list[float] = []
    while True:
        now_s += rng.expovariate(rate_per_s)
        if now_s >= duration_s:
            return arrivals
        arrivals.append(now_s)


def open_loop(seed: str, rate_per_s: float, duration_s: float, vocab_size: int) -> list[Request]:
    """Requests of mixed lengths at Poisson arrivals."""
    arrivals = poisson_schedule(f"{seed} arrivals", rate_per_s, duration_s)
    rng = random.Random(f"{seed} lengths")
    lengths = [rng.choice(PROMPT_LENGTHS) for _ in arrivals]
    texts = prompts(f"{seed} prompts", len(arrivals), lengths, vocab_size)
    return [Request(ids, rng.choice(OUTPUT_LENGTHS), at_s) for ids, at_s in zip(texts, arrivals, strict=True)]


def is_good(request: Request, stream: Stream, targets: Targets) -> bool:
    """Whether a request was answered in full and within both targets."""
    if stream.error is not None or len(stream.token_ids) != request.max_tokens:
        return False
    first_s, last_s, count = stream.token_s[0], stream.token_s[-1], len(stream.token_s)
    mean_itl_ms = 1e3 * (last_s - first_s) / (count - 1) if count > 1 else 0.0
    return 1e3 * (first_s - request.at_s) <= targets.ttft_ms and mean_itl_ms <= targets.itl_ms


def goodput(
    rate_per_s: float, requests: Sequence[Request], streams: Sequence[Stream], targets: Targets
) -> dict[str, Any]:
    """What came of one rate, as an object of results.json. Rates are over the time until the last token."""
    total_s = max((stream.token_s[-1] for stream in streams if stream.token_s), default=0.0)
    good = [stream for r, stream in zip(requests, streams, strict=True) if is_good(r, stream, targets)]
    first = [1e3 * (s.token_s[0] - r.at_s) for r, s in zip(requests, streams, strict=True) if s.token_s]
    gaps = itl_ms(streams)
    return {
        "rate_per_s": rate_per_s,
        "requests": len(requests),
        "failed": sum(stream.error is not None for stream in streams),
        "good": len(good),
        "total_s": total_s,
        "goodput_req_s": len(good) / total_s if total_s else 0.0,
        "goodput_tok_s": sum(len(stream.token_ids) for stream in good) / total_s if total_s else 0.0,
        "output_tok_s": sum(len(stream.token_ids) for stream in streams) / total_s if total_s else 0.0,
        "ttft_ms_p50": percentile(first, 50) if first else None,
        "ttft_ms_p99": percentile(first, 99) if first else None,
        "itl_ms_p50": percentile(gaps, 50) if gaps else None,
        "itl_ms_p99": percentile(gaps, 99) if gaps else None,
        "targets": asdict(targets),
    }

"""What a prefix cache saves: the time to first token of prompts that share a long beginning, once it is known.

Without a prefix cache the first such prompt (cold) and later ones (warm) take equally long.
"""

from statistics import median
from typing import Any

from bench.closed import Asked
from bench.measure import check_complete, ttft_ms
from bench.worker import Request
from bench.workload import prompts

PREFIX_TOKENS, SUFFIX_TOKENS = 1024, 32
PREFIXES, REPEATS = 4, 3


def prefix_effect(system: Asked, name: str, seed: str, vocab_size: int) -> dict[str, Any]:
    """TTFT of a prefix's first prompt (cold) and of later ones (warm), one request at a time. Raises BenchError."""
    cold: list[float] = []
    warm: list[float] = []
    for number, prefix in enumerate(prompts(f"{seed} prefix", PREFIXES, [PREFIX_TOKENS], vocab_size)):
        for again, suffix in enumerate(prompts(f"{seed} suffix {number}", 1 + REPEATS, [SUFFIX_TOKENS], vocab_size)):
            requests = [Request(prefix + suffix, 1)]
            streams = system.ask(requests).streams
            check_complete(name, requests, streams)
            (warm if again else cold).extend(ttft_ms(requests, streams))
    return {
        "system": name,
        "prefix_tokens": PREFIX_TOKENS,
        "suffix_tokens": SUFFIX_TOKENS,
        "cold_ttft_ms_p50": median(cold),
        "warm_ttft_ms_p50": median(warm),
        "cold_over_warm": median(cold) / median(warm),
    }

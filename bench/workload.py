"""What is asked of every system: prompts and arrivals, the same for the same seed. No clock, no tokens' text."""

import random
from collections.abc import Sequence

from bench.worker import Request

PARTS = ("closed", "open", "prefix", "shards", "long")
PROMPT_TOKENS = 128
OUTPUT_TOKENS = 128


def prompts(seed: str, count: int, lengths: Sequence[int], vocab_size: int) -> list[list[int]]:
    """`count` prompts of random token ids, of `lengths` in turn. seed: names the run, so that no two share a prompt."""
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(lengths[number % len(lengths)])] for number in range(count)]


def closed_loop(seed: str, concurrency: int, max_tokens: int, vocab_size: int) -> list[Request]:
    """`concurrency` requests at once, each of PROMPT_TOKENS tokens."""
    return [Request(ids, max_tokens) for ids in prompts(seed, concurrency, [PROMPT_TOKENS], vocab_size)]

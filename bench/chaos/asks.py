"""What the load asks: requests of every kind whose answer is known before. Same seed, same requests."""

import random
from dataclasses import dataclass
from typing import Any

from bench.workload import prompts

PROMPT_LENGTHS = (24, 48, 96)
OUTPUT_LENGTHS = (300, 400, 500)
GREEDY: dict[str, Any] = {"temperature": 0.0}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "seeded": {"temperature": 0.8, "top_p": 0.95},
    "penalties": GREEDY | {"frequency_penalty": 0.4, "repetition_penalty": 1.1},
    "logprobs": GREEDY | {"logprobs": 2},
    "two answers": {"temperature": 0.8, "n": 2},
}
"""Besides max_tokens, ignore_eos and a seed. In bf16 a sampled token cannot be judged by its logit: only greedy is."""


@dataclass(frozen=True)
class Ask:
    """One request. sampling: the client's keyword arguments."""

    token_ids: list[int]
    sampling: dict[str, Any]

    @property
    def is_greedy(self) -> bool:
        return self.sampling.keys() == {*GREEDY, "max_tokens", "ignore_eos", "seed"}

    @property
    def max_tokens(self) -> int:
        """Of all answers together."""
        return int(self.sampling["max_tokens"]) * int(self.sampling.get("n", 1))


def asks(seed: int, number: int, vocab_size: int, *, greedy_only: bool) -> list[Ask]:
    """`number` different requests: lengths and kinds in turn, so that any few of them are alike in work."""
    rng = random.Random(f"{seed} asks")
    kinds = ["greedy"] if greedy_only else list(KINDS)
    texts = prompts(f"{seed} prompts", number, PROMPT_LENGTHS, vocab_size)
    made = []
    for index, token_ids in enumerate(texts):
        kind = KINDS[kinds[index % len(kinds)]]
        # Two answers of half the length are as much work as one.
        length = OUTPUT_LENGTHS[(index + index // 3) % len(OUTPUT_LENGTHS)] // kind.get("n", 1)
        made.append(Ask(token_ids, kind | {"max_tokens": length, "ignore_eos": True, "seed": rng.randrange(2**31)}))
    return made

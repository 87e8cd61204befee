"""Which router a request goes to."""

from collections.abc import Mapping, Sequence
from hashlib import blake2b

# A router caches prompts in blocks of so many tokens, at most. A shorter prompt is not found again.
AFFINITY_TOKENS = 64
# The preferred router is taken up to this load, in requests: AFFINITY_FACTOR * least + AFFINITY_SLACK.
AFFINITY_FACTOR, AFFINITY_SLACK = 1.5, 2


def choose_router(loads: Mapping[str, int], prompt_token_ids: Sequence[int]) -> str:
    """The router for a prompt, by name.

    loads: requests that run or wait at each router that takes new ones; at least one entry.

    Prompts with the same first AFFINITY_TOKENS tokens prefer the same router, which may have their
    prefix in its cache. Rendezvous hashing finds it: the router with the highest hash of (first
    tokens, its name). So every frontend prefers the same one without asking another. When a
    router goes, only the prompts that preferred it move.

    A router that is much busier than the least busy one is not taken. The least busy one is, and
    of several the one with the highest hash. Short prompts always go there.

    Example: a prompt prefers router-1, and the loads are router-0 4, router-1 8. 1.5 * 4 + 2 is 8,
    so router-1 is taken. With 9 there it would be router-0.
    """
    key = b"".join(token_id.to_bytes(8, "little") for token_id in prompt_token_ids[:AFFINITY_TOKENS])

    def score(name: str) -> bytes:
        return blake2b(name.encode(), key=blake2b(key).digest()).digest()

    least = min(loads.values())
    if len(prompt_token_ids) >= AFFINITY_TOKENS:
        preferred = max(loads, key=score)
        if loads[preferred] <= AFFINITY_FACTOR * least + AFFINITY_SLACK:
            return preferred
    return max((name for name, load in loads.items() if load == least), key=score)

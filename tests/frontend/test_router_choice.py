"""Load and prefixes decide where a prompt goes."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from frontend.router_choice import AFFINITY_FACTOR, AFFINITY_SLACK, AFFINITY_TOKENS, choose_router

NAMES = [f"router-{number}" for number in range(5)]
IDLE = dict.fromkeys(NAMES, 0)
PREFIX = tuple(range(AFFINITY_TOKENS))


def test_prompts_with_the_same_first_block_share_a_router_and_others_spread() -> None:
    assert len({choose_router(IDLE, (*PREFIX, tail)) for tail in range(50)}) == 1
    chosen = Counter(choose_router(IDLE, (head, *PREFIX)) for head in range(500))
    assert set(chosen) == set(NAMES)
    assert max(chosen.values()) < 2 * min(chosen.values())


def test_a_preferred_router_is_left_once_it_is_much_busier() -> None:
    preferred = choose_router(IDLE, PREFIX)
    others = {name: 4 for name in NAMES if name != preferred}
    assert choose_router(others | {preferred: 8}, PREFIX) == preferred
    assert choose_router(others | {preferred: 9}, PREFIX) in others


@given(st.dictionaries(st.sampled_from(NAMES), st.integers(0, 50), min_size=1), st.integers(0, 2**64 - 1))
def test_nobody_is_sent_to_a_router_that_is_much_busier_than_another(loads: dict[str, int], head: int) -> None:
    assert loads[choose_router(loads, (head, *PREFIX))] <= AFFINITY_FACTOR * min(loads.values()) + AFFINITY_SLACK
    assert loads[choose_router(loads, (head,))] == min(loads.values())


def test_when_a_router_goes_only_the_prompts_that_preferred_it_move() -> None:
    prompts = [(head, *PREFIX) for head in range(100)]
    before = [choose_router(IDLE, prompt) for prompt in prompts]
    without = dict.fromkeys(NAMES[1:], 0)
    after = [choose_router(without, prompt) for prompt in prompts]
    moved = [old for old, new in zip(before, after, strict=True) if old != new]
    assert moved
    assert set(moved) == {NAMES[0]}

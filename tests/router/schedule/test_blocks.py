"""The pool of KV units: who holds what, what is kept for its content, and what goes first."""

import pytest

from router.schedule.blocks import Block, BlockPool


def allocate(pool: BlockPool, units: int = 1) -> Block:
    block = pool.allocate(units)
    assert block is not None
    return block


def cached(pool: BlockPool, key: str, units: int = 1) -> Block:
    """A block that is published and that nobody holds."""
    block = allocate(pool, units)
    pool.publish(block, key)
    pool.release(block)
    return block


def books(pool: BlockPool) -> tuple[int, int, int]:
    return pool.available_units, pool.used_units, pool.cached_units


def test_a_new_pool_is_empty() -> None:
    assert books(BlockPool(8)) == (8, 0, 0)


def test_blocks_that_are_held_have_no_unit_in_common() -> None:
    pool = BlockPool(8)
    units = [unit for _ in range(4) for unit in allocate(pool, 2).units]
    assert sorted(units) == list(range(8))


def test_nothing_is_given_when_too_little_is_left() -> None:
    pool = BlockPool(8)
    allocate(pool, 6)
    assert pool.allocate(3) is None
    assert books(pool) == (2, 6, 0)


def test_a_released_block_is_available_at_once() -> None:
    pool = BlockPool(2)
    pool.release(allocate(pool, 2))
    assert books(pool) == (2, 0, 0)
    assert sorted(allocate(pool, 2).units) == [0, 1]


def test_a_block_is_held_until_its_last_holder_lets_go() -> None:
    pool = BlockPool(2)
    block = allocate(pool, 2)
    pool.publish(block, "a")
    pool.hold(block)
    pool.release(block)
    assert books(pool) == (0, 2, 0)
    pool.release(block)
    assert books(pool) == (2, 0, 2)


def test_letting_go_of_what_nobody_holds_is_a_defect() -> None:
    pool = BlockPool(2)
    block = cached(pool, "a")
    with pytest.raises(AssertionError):
        pool.release(block)


def test_a_published_block_is_found_by_its_key_only() -> None:
    pool = BlockPool(8)
    block = cached(pool, "a")
    assert pool.find("a") is block
    assert pool.find("b") is None


def test_a_block_that_was_not_published_is_never_found() -> None:
    pool = BlockPool(8)
    pool.release(allocate(pool))
    assert pool.find(None) is None


def test_a_cached_block_that_is_held_again_is_used_and_not_available() -> None:
    pool = BlockPool(2)
    pool.hold(cached(pool, "a"))
    assert books(pool) == (1, 1, 0)
    assert pool.allocate(2) is None


def test_free_units_are_taken_before_cached_ones() -> None:
    pool = BlockPool(4)
    block = cached(pool, "a")
    allocate(pool, 3)
    assert pool.find("a") is block


def test_memory_that_is_needed_takes_the_place_of_cached_blocks() -> None:
    pool = BlockPool(4)
    cached(pool, "a", units=3)
    assert sorted(allocate(pool, 4).units) == [0, 1, 2, 3]
    assert pool.find("a") is None
    assert books(pool) == (0, 4, 0)


def kept_of(pool: BlockPool, keys: str) -> str:
    return "".join(key for key in keys if pool.find(key) is not None)


def test_the_longest_unused_block_goes_first() -> None:
    pool = BlockPool(3)
    blocks = {key: cached(pool, key) for key in "abc"}
    pool.hold(blocks["a"])
    pool.release(blocks["a"])  # used once more: now `b` is the longest unused
    kept = []
    for _ in range(3):
        allocate(pool)
        kept.append(kept_of(pool, "abc"))
    assert kept == ["ac", "a", ""]


def test_no_more_blocks_go_than_memory_is_needed() -> None:
    pool = BlockPool(4)
    for key in "abcd":
        cached(pool, key)
    allocate(pool, 2)
    assert kept_of(pool, "abcd") == "cd"


def test_a_held_block_never_goes() -> None:
    pool = BlockPool(3)
    held = cached(pool, "held")
    pool.hold(held)
    cached(pool, "idle")
    allocate(pool, 2)
    assert pool.allocate(1) is None
    assert pool.find("held") is held


def test_a_second_block_with_the_same_content_stays_unknown_and_is_not_kept() -> None:
    pool = BlockPool(4)
    first, second = allocate(pool), allocate(pool)
    pool.publish(first, "a")
    pool.publish(second, "a")
    assert pool.find("a") is first
    pool.release(second)
    assert books(pool) == (3, 1, 0)
    pool.release(first)
    assert books(pool) == (4, 0, 1)


def test_content_that_was_pushed_out_can_be_published_again() -> None:
    pool = BlockPool(1)
    cached(pool, "a")
    block = allocate(pool)
    pool.publish(block, "a")
    assert pool.find("a") is block

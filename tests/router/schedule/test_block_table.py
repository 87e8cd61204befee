"""One sequence's blocks: how they grow, what others can take over, and what is let go when."""

from collections.abc import Sequence

import pytest

from router.schedule.block_table import BlockTable, PrefixKeys, TableEntry
from router.schedule.blocks import BlockPool
from router.schedule.kv_layout import KvLayout
from tests.router.engines import LIKE_SCOUT, layout_of

TOKENS = list(range(100, 140))
CHUNK = LIKE_SCOUT.chunk_tokens  # 8 tokens, in blocks of 2
ONLY_GLOBAL, ONLY_CHUNKED = layout_of(1, 0), layout_of(0, 1)


def make_table(pool: BlockPool, layout: KvLayout = LIKE_SCOUT) -> BlockTable:
    return BlockTable(layout, pool, PrefixKeys(layout.block_tokens))


def compute(table: BlockTable, token_ids: Sequence[int], first: int = 0) -> list[bytes]:
    """Tokens from `first` to the end, a chunk at a time; gives the keys that were published."""
    keys = []
    while first < len(token_ids):
        length = min(len(token_ids), first - first % CHUNK + CHUNK) - first
        assert table.grow(first, length) == length
        first += length
        keys += table.mark_computed(token_ids, first)
    return keys


def leave_behind(pool: BlockPool, token_ids: Sequence[int], layout: KvLayout = LIKE_SCOUT) -> None:
    """A sequence came, computed these tokens, and went."""
    table = make_table(pool, layout)
    compute(table, token_ids)
    table.release()


# Keys.


@pytest.mark.parametrize(
    ("token_ids", "equal"), [((1, 2, 3, 4), 2), ((1, 2, 3, 9), 1), ((9, 2, 3, 4), 0), ((2, 1, 3, 4), 0)]
)
def test_a_key_tells_all_tokens_up_to_its_blocks_end(token_ids: Sequence[int], equal: int) -> None:
    ours, theirs = PrefixKeys(2).of((1, 2, 3, 4), 2), PrefixKeys(2).of(token_ids, 2)
    assert [a == b for a, b in zip(ours, theirs, strict=True)] == [nth < equal for nth in range(2)]


def test_keys_stay_the_same_while_their_sequence_grows() -> None:
    keys = PrefixKeys(2)
    first = list(keys.of([1, 2, 3], 1))
    assert keys.of([1, 2, 3, 4, 5], 2)[:1] == first
    assert keys.of([1, 2, 3, 4, 5], 2) == PrefixKeys(2).of([1, 2, 3, 4], 2)


# Growth.


@pytest.mark.parametrize(
    ("layout", "units"), [(LIKE_SCOUT, [4, 4, 8]), (ONLY_GLOBAL, [1, 1, 2]), (ONLY_CHUNKED, [1, 1, 2])]
)
def test_a_sequence_takes_a_block_when_the_last_one_is_full(layout: KvLayout, units: list[int]) -> None:
    pool = BlockPool(100)
    table, used = make_table(pool, layout), []
    for position in range(3):
        table.grow(position, 1)
        used.append(pool.used_units)
    assert used == units


def test_the_tensors_side_is_told_of_every_new_block_once() -> None:
    table = make_table(BlockPool(100))
    table.grow(0, 3)
    assert table.new_entries == [
        TableEntry(first_table=0, index=0, units=(0,)),
        TableEntry(first_table=1, index=0, units=(1, 2, 3)),
        TableEntry(first_table=0, index=1, units=(4,)),
        TableEntry(first_table=1, index=1, units=(5, 6, 7)),
    ]
    table.new_entries.clear()
    table.grow(3, 1)
    assert table.new_entries == []


def test_when_memory_runs_out_there_is_room_for_fewer_tokens() -> None:
    pool = BlockPool(4 * 2 + 3)
    table = make_table(pool)
    assert table.grow(0, 1) == 1
    assert table.grow(1, 6) == 3
    assert table.grow(4, 3) == 0
    assert pool.available_units == 3  # a global unit without its chunked ones would be of no use


def test_a_new_chunk_starts_with_new_chunked_blocks() -> None:
    pool = BlockPool(100)
    table = make_table(pool)
    compute(table, TOKENS[:CHUNK])
    table.new_entries.clear()
    table.grow(CHUNK, 1)
    assert [(entry.first_table, entry.index) for entry in table.new_entries] == [(0, 4), (1, 0)]


@pytest.mark.parametrize(("computed", "units"), [(7, 4 + 3 * 4), (8, 4), (9, 5 + 3), (15, 8 + 3 * 4), (16, 8)])
def test_chunked_layers_let_go_when_their_chunk_ends(computed: int, units: int) -> None:
    pool = BlockPool(100)
    table = make_table(pool)
    compute(table, TOKENS[:computed])
    assert (pool.used_units, table.units) == (units, units)


def test_a_span_across_the_chunk_border_is_a_defect() -> None:
    table = make_table(BlockPool(100))
    compute(table, TOKENS[:6])
    with pytest.raises(AssertionError):
        table.grow(6, 3)


def test_a_sequence_that_goes_lets_everything_go() -> None:
    pool = BlockPool(100)
    table = make_table(pool)
    compute(table, TOKENS[:11])
    table.release()
    assert (pool.used_units, table.units) == (0, 0)


# Taking over what others computed.


def adopted(pool: BlockPool, token_ids: Sequence[int], layout: KvLayout = LIKE_SCOUT) -> int:
    return make_table(pool, layout).adopt_prefix(token_ids)


@pytest.mark.parametrize("layout", [LIKE_SCOUT, ONLY_GLOBAL, ONLY_CHUNKED], ids=["both", "global", "chunked"])
@pytest.mark.parametrize(
    ("in_common", "spared"),
    [(0, 0), (1, 0), (2, 2), (5, 4), (7, 6), (8, 8), (9, 8), (13, 12), (16, 16), (20, 20)],
)
def test_whole_blocks_in_common_are_spared_wherever_they_end_in_a_chunk(
    layout: KvLayout, in_common: int, spared: int
) -> None:
    pool = BlockPool(100)
    leave_behind(pool, TOKENS[:24], layout)
    assert adopted(pool, [*TOKENS[:in_common], *range(500, 510)], layout) == spared


@pytest.mark.parametrize(("length", "spared"), [(1, 0), (2, 0), (3, 2), (8, 6), (9, 8), (10, 8), (16, 14), (17, 16)])
def test_the_last_token_is_always_left_to_compute(length: int, spared: int) -> None:
    pool = BlockPool(100)
    leave_behind(pool, TOKENS[:24])
    assert adopted(pool, TOKENS[:length]) == spared


def test_a_running_sequences_blocks_are_shared_while_it_runs() -> None:
    pool = BlockPool(100)
    running, second = make_table(pool), make_table(pool)
    compute(running, TOKENS[:7])
    used = pool.used_units
    assert second.adopt_prefix(TOKENS[:20]) == 6
    assert pool.used_units == used
    running.release()
    assert pool.used_units == second.units == 3 * 4


def test_a_block_that_is_not_full_is_not_shared() -> None:
    pool = BlockPool(100)
    table = make_table(pool)
    table.grow(0, 4)
    table.mark_computed(TOKENS, 3)
    assert adopted(pool, TOKENS) == 2


def test_a_prefix_in_the_second_chunk_needs_no_chunked_blocks_of_the_first() -> None:
    pool = BlockPool(100)
    leave_behind(pool, TOKENS[:14])
    table = make_table(pool)
    assert table.adopt_prefix(TOKENS[:30]) == 14
    assert [(entry.first_table, entry.index) for entry in table.new_entries] == [
        *((0, index) for index in range(7)),
        *((1, index) for index in range(3)),
    ]


def evict(pool: BlockPool, units: int) -> None:
    """Push the longest unused blocks out of a pool that has no free units left."""
    block = pool.allocate(units)
    assert block is not None


def test_without_its_chunked_part_a_prefix_ends_at_the_last_chunk_border() -> None:
    pool = BlockPool(7 + 3 * 7)
    leave_behind(pool, TOKENS[:14])  # unused since: the first chunk's 4 chunked blocks, then the second's 3
    evict(pool, 3 * 7)
    assert adopted(pool, TOKENS[:30]) == 8


def test_what_is_missing_of_the_chunked_part_shortens_a_prefix() -> None:
    pool = BlockPool(7 + 3 * 7)
    leave_behind(pool, TOKENS[:14])
    evict(pool, 3 * 4 + 3)  # the deepest of the second chunk goes first
    assert adopted(pool, TOKENS[:30]) == 12


def test_without_its_start_no_prefix_is_found() -> None:
    pool = BlockPool(7 + 3 * 7)
    leave_behind(pool, TOKENS[:14])
    evict(pool, 7 + 3 * 7)
    assert adopted(pool, TOKENS[:30]) == 0


def test_the_deepest_block_of_a_prefix_goes_first() -> None:
    pool = BlockPool(8)
    leave_behind(pool, TOKENS[:16], ONLY_GLOBAL)
    spared = []
    for _ in range(3):
        evict(pool, 1)
        table = make_table(pool, ONLY_GLOBAL)
        spared.append(table.adopt_prefix(TOKENS[:30]))
        table.release()
    assert spared == [14, 12, 10]


def test_what_was_taken_over_is_not_published_again() -> None:
    pool = BlockPool(100)
    leave_behind(pool, TOKENS[:6])
    table = make_table(pool)
    first = table.adopt_prefix(TOKENS[:10])
    assert compute(table, TOKENS[:10], first) == PrefixKeys(2).of(TOKENS, 5)[3:]


def test_content_that_two_computed_is_kept_once() -> None:
    pool = BlockPool(100)
    tables = [make_table(pool), make_table(pool)]
    for table in tables:
        compute(table, TOKENS[:6])
    for table in tables:
        table.release()
    assert (pool.used_units, pool.cached_units) == (0, 3 * 4)

"""Which shard holds which experts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.placement import Placement, even_placement, uniform_placement


def shards(num_experts: int, num_shards: int) -> list[int]:
    """The shard of each expert, in a layer where each has one."""
    placement = even_placement([0], num_experts, num_shards)
    return [shard for [shard] in placement.shards_of[0]]


@pytest.mark.parametrize(
    ("num_experts", "num_shards", "expected"),
    [
        (5, 2, [0, 0, 0, 1, 1]),
        (4, 4, [0, 1, 2, 3]),
        (3, 1, [0, 0, 0]),
        (1, 1, [0]),
        (7, 3, [0, 0, 0, 1, 1, 2, 2]),
    ],
)
def test_experts_are_shared_out_in_blocks(num_experts: int, num_shards: int, expected: list[int]) -> None:
    assert shards(num_experts, num_shards) == expected


def test_every_moe_layer_is_placed_and_no_other() -> None:
    placement = even_placement((1, 3, 5), 4, 2, epoch=7)
    assert list(placement.shards_of) == [1, 3, 5]
    assert placement.epoch == 7
    assert list(placement.slots_of(0)) == [(layer, expert) for layer in (1, 3, 5) for expert in (0, 1)]
    assert list(placement.slots_of(1)) == [(layer, expert) for layer in (1, 3, 5) for expert in (2, 3)]


def test_an_expert_on_several_shards_is_held_by_each_of_them() -> None:
    placement = uniform_placement(3, {0: ((0, 2), (1,), (2, 1))})
    assert [list(placement.slots_of(shard)) for shard in range(3)] == [[(0, 0)], [(0, 1), (0, 2)], [(0, 0), (0, 2)]]


def test_each_expert_has_a_version_of_its_own_whatever_the_epoch() -> None:
    placement = Placement(9, 2, {0: ((0,), (1,)), 4: ((1,), (1, 0))}, {0: (3, 1), 4: (2, 5)})
    assert placement.slots_of(0) == {(0, 0): 3, (4, 1): 5}
    assert placement.slots_of(1) == {(0, 1): 1, (4, 0): 2, (4, 1): 5}


def test_all_experts_may_have_one_version() -> None:
    assert set(even_placement([1, 3], 5, 2, version=4).slots_of(1).values()) == {4}


@pytest.mark.parametrize("num_shards", [0, 5])
def test_more_shards_than_experts_or_none_is_a_defect(num_shards: int) -> None:
    with pytest.raises(AssertionError, match=f"{num_shards} shards for 4 experts"):
        even_placement([0], 4, num_shards)


sizes = st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@given(sizes)
def test_shards_differ_by_at_most_one_expert(size: tuple[int, int]) -> None:
    num_experts, num_shards = size
    placed = shards(num_experts, num_shards)
    counts = [placed.count(shard) for shard in range(num_shards)]
    assert max(counts) - min(counts) <= 1


@given(sizes)
def test_every_expert_is_held_once_in_contiguous_blocks(size: tuple[int, int]) -> None:
    num_experts, num_shards = size
    placement = even_placement([0], num_experts, num_shards)
    held = [expert for shard in range(num_shards) for _, expert in placement.slots_of(shard)]
    assert held == list(range(num_experts))


def test_replicas_are_spread_over_all_other_shards() -> None:
    placement = even_placement([0], 6, 3, replicas=2)
    assert placement.shards_of[0] == ((0, 1), (0, 2), (1, 2), (1, 0), (2, 0), (2, 1))


def test_replicas_are_on_other_nodes_where_there_are_some() -> None:
    placement = even_placement([0], 8, 4, replicas=2, nodes=["a", "a", "b", "b"])
    nodes = ["aabb"[first] + "aabb"[second] for first, second in placement.shards_of[0]]
    assert set(nodes) == {"ab", "ba"}
    assert {len(placement.slots_of(shard)) for shard in range(4)} == {4}


@settings(deadline=None)
@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, min(n, 32)))), st.data())
def test_every_replica_is_on_a_shard_of_its_own_and_shards_hold_about_as_many(
    size: tuple[int, int], data: st.DataObject
) -> None:
    num_experts, num_shards = size
    replicas = data.draw(st.integers(1, min(3, num_shards)))
    placement = even_placement([0], num_experts, num_shards, replicas=replicas)
    assert all(len(set(shards)) == len(shards) == replicas for shards in placement.shards_of[0])
    counts = [len(placement.slots_of(shard)) for shard in range(num_shards)]
    assert max(counts) - min(counts) <= 2

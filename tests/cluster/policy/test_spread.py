"""Placements for other shards: even, survivable, and no byte moved for nothing."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.policy.spread import spread
from experts.placement import Placement, even_placement, uniform_placement

ONCE = even_placement([0, 1], 4, 2)
PLENTY = 100


def on_one_node(*shards: int) -> dict[int, str]:
    return dict.fromkeys(shards, "a")


def loads(before: Placement, after: Placement) -> int:
    """How many (layer, expert) have to be read."""
    pairs = ((layer, expert) for layer, experts in after.shards_of.items() for expert in range(len(experts)))
    return sum(len({*after.shards_of[at][expert]} - {*before.shards_of[at][expert]}) for at, expert in pairs)


def test_what_is_even_already_stays_as_it_is() -> None:
    assert spread(ONCE, on_one_node(0, 1), 1, 3) is ONCE
    twice = even_placement([0], 8, 3, replicas=2)
    assert spread(twice, on_one_node(0, 1, 2), 2, PLENTY) is twice


def test_a_new_shard_gets_its_share_from_another_one_in_each_layer() -> None:
    target = spread(ONCE, on_one_node(0, 1, 2), 1, 3)
    assert loads(ONCE, target) == 2
    assert target.shards_of == {0: ((0,), (0,), (1,), (2,)), 1: ((0,), (2,), (1,), (1,))}
    assert [sorted(Counter(shard for [shard] in experts).values()) for experts in target.shards_of.values()] == [
        [1, 1, 2],
        [1, 1, 2],
    ]
    assert [len(target.slots_of(shard)) for shard in range(3)] == [3, 3, 2]
    assert (target.num_shards, target.epoch) == (3, ONCE.epoch + 1)


def test_what_a_shard_that_leaves_has_is_spread_over_the_others() -> None:
    three = even_placement([0], 6, 3)
    target = spread(three, on_one_node(0, 2), 1, PLENTY)
    assert target.used_shards == {0, 2}
    assert loads(three, target) == 2
    assert [len(target.slots_of(shard)) for shard in (0, 2)] == [3, 3]


def test_replicas_come_on_other_nodes_and_go_again() -> None:
    nodes = {0: "a", 1: "a", 2: "b"}
    once = even_placement([0], 6, 3)
    twice = spread(once, nodes, 2, PLENTY)
    assert all(len({nodes[shard] for shard in shards}) == 2 for shards in twice.shards_of[0])
    back = spread(twice, nodes, 1, PLENTY, keep_extra=False)
    assert [len(shards) for shards in back.shards_of[0]] == [1] * 6
    assert loads(twice, back) == 0


def test_extra_copies_stay_while_there_is_room() -> None:
    hot = uniform_placement(2, {0: ((0, 1), (0,), (1,), (1,))})
    wide = spread(hot, on_one_node(0, 1, 2), 1, PLENTY)
    assert len(wide.shards_of[0][0]) == 2
    assert [len(shards) for shards in spread(hot, on_one_node(0), 1, 5).shards_of[0]] == [1] * 4


@settings(deadline=None)
@given(
    experts=st.integers(1, 12),
    before=st.integers(1, 5),
    after=st.sets(st.integers(0, 6), min_size=1),
    nodes=st.lists(st.sampled_from(["a", "b", ""]), min_size=7, max_size=7),
    replicas=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    keep_extra=st.booleans(),
)
def test_every_expert_has_its_copies_all_is_level_and_a_second_time_changes_nothing(
    experts: int, before: int, after: set[int], nodes: list[str], replicas: tuple[int, int], keep_extra: bool
) -> None:
    before = min(before, experts)
    current = even_placement([0, 1, 2], experts, before, replicas=min(replicas[0], before))
    node_of = {shard: nodes[shard] for shard in after}
    copies = min(replicas[1], len(after))
    slots = -(-experts * copies // len(after)) + 1
    target = spread(current, node_of, copies, slots, keep_extra=keep_extra)
    places = len({node or f"of {shard}" for shard, node in node_of.items()})
    for layer in range(3):
        held = Counter(dict.fromkeys(after, 0))
        for shards in target.shards_of[layer]:
            assert {*shards} <= after
            assert len({*shards}) == len(shards) >= copies
            assert keep_extra or len(shards) == copies
            held.update(shards)
        assert max(held.values()) < slots or any(len(shards) > copies for shards in target.shards_of[layer])
        if copies == 1 or places == len(after):  # nodes bind nothing
            assert max(held.values()) - min(held.values()) <= 1
    assert spread(target, node_of, copies, slots, keep_extra=keep_extra) is target


def test_copies_that_were_to_stay_give_room_to_experts_that_have_none() -> None:
    full = uniform_placement(3, {0: ((0, 1), (0, 1), (0, 1), (2,))})  # 3 of 4 slots are taken on shards 0 and 1
    after = spread(full, on_one_node(0, 1), 1, 4)
    assert max(Counter(shard for holders in after.shards_of[0] for shard in holders).values()) <= 3
    assert all(after.shards_of[0])
    assert spread(after, on_one_node(0, 1), 1, 4) is after

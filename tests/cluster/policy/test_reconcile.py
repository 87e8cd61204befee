"""A deployment that is told to lose parts loses just these, and never what nobody stands in for."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.part_names import part_number
from cluster.policy.reconcile import Create, Forget, Kill, Tell, going, reconcile
from cluster.policy.wanted import Found, Orders, Wanted, can_stand_in, forgotten
from experts.placement import Placement, even_placement, uniform_placement

ONCE = even_placement([0, 1], 4, 2)
TWICE = uniform_placement(3, {0: ((0, 1), (1, 2), (2, 0)), 1: ((0, 1), (1, 2), (2, 0))})
TWO_SHARDS = Wanted(("router-0",), ("shard-0", "shard-1"), ONCE)
REPLICAS = Wanted(("router-0", "router-1"), ("shard-0", "shard-1", "shard-2"), TWICE)


def running(wanted: Wanted, node: str = "a") -> dict[str, Found]:
    routers = {name: Found(node, orders=Orders(shard_names=wanted.shards)) for name in wanted.routers}
    return routers | {name: Found(node) for name in wanted.shards}


def test_what_is_as_wanted_needs_nothing() -> None:
    assert reconcile(TWO_SHARDS, running(TWO_SHARDS)) == []


def test_a_part_that_is_gone_for_good_is_created() -> None:
    found = running(TWO_SHARDS)
    del found["shard-1"], found["router-0"]
    assert reconcile(TWO_SHARDS, found) == [Create("router-0"), Create("shard-1")]


def test_a_shard_goes_once_all_routers_leave_it_alone_and_it_is_idle() -> None:
    wanted, found = replace(REPLICAS, drained={"shard-1": 30.0}), running(REPLICAS)
    alone = Orders(shards=frozenset({1}), shard_names=REPLICAS.shards)
    assert reconcile(wanted, found) == [Tell("router-0", alone), Tell("router-1", alone)]
    found["router-0"] = replace(found["router-0"], orders=alone)
    found["shard-1"] = replace(found["shard-1"], is_idle=True)
    assert reconcile(wanted, found) == [Tell("router-1", alone)]
    found["router-1"] = replace(found["router-1"], orders=None, is_idle=True)  # hung: it cannot be told
    assert reconcile(wanted, found) == [Kill("shard-1")]
    del found["shard-1"]
    assert reconcile(wanted, found) == []
    assert Create("shard-1") in reconcile(REPLICAS, found)
    assert Tell("router-0", Orders(shard_names=REPLICAS.shards)) in reconcile(REPLICAS, found)


def test_a_router_goes_when_it_is_idle_or_its_grace_is_over() -> None:
    wanted, found = replace(REPLICAS, drained={"router-1": 30.0}), running(REPLICAS)
    draining = Orders(is_draining=True, shard_names=REPLICAS.shards)
    assert reconcile(wanted, found) == [Tell("router-1", draining)]
    found["router-1"] = Found("a", orders=draining, draining_s=29.0)
    assert reconcile(wanted, found) == []
    for done in (replace(found["router-1"], is_idle=True), replace(found["router-1"], draining_s=30.0)):
        assert reconcile(wanted, {**found, "router-1": done}) == [Kill("router-1")]


def test_a_router_without_another_moves_at_once_and_serves_until_then() -> None:
    wanted = replace(TWO_SHARDS, cleared={"a": 30.0})
    found = running(TWO_SHARDS, "b") | {"router-0": Found("a", orders=Orders(shard_names=TWO_SHARDS.shards))}
    assert reconcile(wanted, found) == [Kill("router-0")]


def test_a_moved_part_that_lost_its_node_goes_home() -> None:
    """Ray keeps its bundle reserved, so there may be no room for it anywhere else."""
    found = running(TWO_SHARDS) | {"shard-1": Found(None, is_ready=False, is_idle=True, can_go_home=True)}
    assert reconcile(TWO_SHARDS, found) == [Kill("shard-1")]
    del found["shard-1"]
    assert reconcile(TWO_SHARDS, found) == [Create("shard-1")]


def test_replicas_on_a_cleared_node_move_one_after_the_other() -> None:
    wanted, found = replace(REPLICAS, cleared={"a": 30.0}), running(REPLICAS)
    assert going(wanted, found) == ["router-0", "shard-0"]
    found["router-0"] = found["shard-0"] = Found("b", is_ready=False, is_idle=True)
    assert going(wanted, found) == []
    found["router-0"] = found["shard-0"] = Found("b")
    assert going(wanted, found) == ["router-1", "shard-1"]


def test_shards_that_hold_their_experts_alone_move_all_at_once() -> None:
    wanted, found = replace(TWO_SHARDS, cleared={"a": 30.0}), running(TWO_SHARDS, "b")
    found |= {name: Found("a") for name in TWO_SHARDS.shards}
    told = found | {"router-0": Found("b", orders=Orders(shards=frozenset({0, 1}), shard_names=TWO_SHARDS.shards))}
    assert reconcile(wanted, told) == [Kill("shard-0"), Kill("shard-1")]


def test_a_new_part_is_created_and_routers_link_a_new_shard() -> None:
    wanted = replace(TWO_SHARDS, routers=("router-0", "router-1"), shards=("shard-0", "shard-1", "shard-3"))
    orders = Orders(shard_names=wanted.shards)
    new = [Create("router-1"), Create("shard-3")]
    assert reconcile(wanted, running(TWO_SHARDS)) == [*new, Tell("router-0", orders)]


def test_a_released_shard_serves_until_the_placement_gives_it_nothing_and_is_then_forgotten() -> None:
    wanted = replace(TWO_SHARDS, released={"shard-1": 30.0})
    found = running(wanted) | {"shard-1": Found("a", is_idle=True)}
    assert reconcile(wanted, found) == []
    del found["shard-1"]  # it is still needed
    assert reconcile(wanted, found) == [Create("shard-1")]
    found["shard-1"] = Found("a", is_idle=True)

    wanted = replace(wanted, placement=uniform_placement(2, {0: ((0,),) * 4, 1: ((0,),) * 4}))
    assert reconcile(replace(wanted, changing=frozenset({0, 1})), found) == []  # a step may still ask it
    alone = Orders(shards=frozenset({1}), shard_names=wanted.shards)
    assert reconcile(wanted, found) == [Tell("router-0", alone)]
    found["router-0"] = replace(found["router-0"], orders=alone)
    assert reconcile(wanted, found) == [Kill("shard-1")]
    del found["shard-1"]
    assert reconcile(wanted, found) == [Forget("shard-1")]
    wanted = replace(wanted, shards=("shard-0",), released={})
    assert reconcile(wanted, found) == [Tell("router-0", Orders(shard_names=("shard-0",)))]


def test_a_released_router_ends_its_requests_and_goes_once_another_is_ready() -> None:
    wanted = replace(REPLICAS, released={"router-0": 30.0})
    found = running(wanted)
    found["router-1"] = replace(found["router-1"], is_ready=False)
    assert reconcile(wanted, found) == []
    found["router-1"] = replace(found["router-1"], is_ready=True)
    draining = Orders(is_draining=True, shard_names=wanted.shards)
    assert reconcile(wanted, found) == [Tell("router-0", draining)]
    found["router-0"] = replace(found["router-0"], orders=draining, draining_s=29.0)
    assert reconcile(wanted, found) == []
    found["router-0"] = replace(found["router-0"], draining_s=30.0)
    assert reconcile(wanted, found) == [Kill("router-0")]
    del found["router-0"]
    assert reconcile(wanted, found) == [Forget("router-0")]


def test_a_router_on_a_cleared_node_does_not_count_on_a_released_one() -> None:
    """So it moves at once: nobody will stand in for it."""
    wanted = replace(REPLICAS, released={"router-1": 30.0}, cleared={"a": 30.0})
    found = running(wanted, "b") | {"router-0": Found("a", orders=Orders(shard_names=wanted.shards))}
    del found["router-1"]
    assert reconcile(wanted, found) == [Forget("router-1"), Kill("router-0")]


@settings(deadline=None)
@given(
    drained=st.sets(st.sampled_from(REPLICAS.parts)),
    released=st.sets(st.sampled_from([*REPLICAS.routers[1:], *REPLICAS.shards[1:]])),
    nodes=st.lists(st.sampled_from("ab"), min_size=5, max_size=5),
    cleared=st.sets(st.just("a")),
    crashes=st.lists(st.sampled_from([None, *REPLICAS.parts]), max_size=20),
    moved_after=st.integers(0, 10),
)
def test_repeated_it_gets_there_and_always_leaves_a_stand_in(
    drained: set[str],
    released: set[str],
    nodes: list[str],
    cleared: set[str],
    crashes: list[str | None],
    moved_after: int,
) -> None:
    """A world in which parts do as they are told, and lose at each step one that Ray starts again, not ready yet.

    After some steps the placement gives released shards nothing any more.
    """
    wanted = replace(
        REPLICAS,
        drained=dict.fromkeys(drained, 9.0),
        cleared=dict.fromkeys(cleared, 9.0),
        released=dict.fromkeys(released, 9.0),
    )
    found = {name: replace(part, node=node) for (name, part), node in zip(running(wanted).items(), nodes, strict=True)}
    steps = 0
    while (
        (actions := reconcile(wanted, found))
        or steps <= moved_after
        or not all(part.is_ready for part in found.values())
    ):
        steps += 1
        assert steps < 100
        ready = {name for name, part in found.items() if part.is_ready}
        killed = {action.part for action in actions if isinstance(action, Kill)}
        for name in killed:
            possible = can_stand_in({*wanted.parts} - drained - released - {name}, name, wanted)
            assert not possible or can_stand_in(ready - killed, name, wanted), (name, ready)
        for part in found:
            found[part] = replace(found[part], is_ready=True)
        for action in actions:
            match action:
                case Create(part):
                    orders = Orders() if part in wanted.routers else None
                    found[part] = Found("b", is_ready=False, orders=orders)
                case Tell(router, orders):
                    found[router] = replace(found[router], orders=orders, draining_s=9.0 if orders.is_draining else 0.0)
                    found |= {name: replace(found[name], is_idle=True) for name in wanted.shards if name in found}
                case Kill(part):
                    del found[part]
                case Forget(part):
                    assert part not in found
                    wanted = forgotten(part, wanted)
        if crashes and (crashed := crashes.pop()) in found:
            orders = Orders() if crashed in wanted.routers else None
            found[crashed] = Found(found[crashed].node, is_ready=False, is_idle=True, orders=orders)
        if not found.keys() & {*REPLICAS.routers}:  # nobody asks them
            found |= {name: replace(found[name], is_idle=True) for name in wanted.shards if name in found}
        if steps == moved_after + 1:
            wanted = replace(wanted, placement=_on_shards_without(released))
    moved = {name for name, part in found.items() if part.node == "a"} if cleared else set()
    assert {*found} == {*REPLICAS.parts} - drained - released
    assert {*wanted.parts} == {*REPLICAS.parts} - released
    assert wanted.released == {}
    assert not moved


def _on_shards_without(released: set[str]) -> Placement:
    left = [part_number(name) for name in REPLICAS.shards if name not in released]
    holders = {layer: tuple(tuple(left[:2]) for _ in range(3)) for layer in (0, 1)}
    return uniform_placement(3, holders) if len(left) < 3 else TWICE

"""A deployment that is told to lose parts loses just these, and never what nobody stands in for."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.reconcile import Create, Kill, Tell, going, reconcile
from cluster.policy.wanted import Found, Orders, Wanted, can_stand_in
from experts.placement import even_placement, uniform_placement

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


@given(
    drained=st.sets(st.sampled_from(REPLICAS.parts)),
    nodes=st.lists(st.sampled_from("ab"), min_size=5, max_size=5),
    cleared=st.sets(st.just("a")),
    crashes=st.lists(st.sampled_from([None, *REPLICAS.parts]), max_size=20),
)
def test_repeated_it_gets_there_and_always_leaves_a_stand_in(
    drained: set[str], nodes: list[str], cleared: set[str], crashes: list[str | None]
) -> None:
    """A world in which parts do as they are told, and lose at each step one that Ray starts again, not ready yet."""
    wanted = replace(REPLICAS, drained=dict.fromkeys(drained, 9.0), cleared=dict.fromkeys(cleared, 9.0))
    found = {name: replace(part, node=node) for (name, part), node in zip(running(wanted).items(), nodes, strict=True)}
    steps = 0
    while (actions := reconcile(wanted, found)) or not all(part.is_ready for part in found.values()):
        steps += 1
        assert steps < 100
        ready = {name for name, part in found.items() if part.is_ready}
        killed = {action.part for action in actions if isinstance(action, Kill)}
        for name in killed:
            possible = can_stand_in({*wanted.parts} - drained - {name}, name, wanted)
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
        if crashes and (crashed := crashes.pop()) in found:
            orders = Orders() if crashed in wanted.routers else None
            found[crashed] = Found(found[crashed].node, is_ready=False, is_idle=True, orders=orders)
    moved = {name for name, part in found.items() if part.node == "a"} if cleared else set()
    assert {*found} == {*wanted.parts} - drained
    assert not moved

"""What a resize makes of a deployment, what it refuses, and that it goes on until it is done."""

import re
from dataclasses import replace

import pytest

from cluster.policy.reconcile import Create, Forget, Kill, Tell, reconcile
from cluster.policy.resize import Room, abort, begin, target, waits_for
from cluster.policy.wanted import Found, Orders, Resize, Wanted, forgotten
from experts.placement import even_placement, uniform_placement
from tests.cluster.policy.test_reconcile import REPLICAS, TWO_SHARDS, running

NEEDS = {"router": {"CPU": 0.5}, "shard": {"CPU": 0.1}}
ROOM = Room(4, NEEDS, {"a": {"CPU": 8.0}})
ROOM6 = replace(ROOM, slots=6)
GRACE_S = 30.0
TWICE_ON_TWO = replace(TWO_SHARDS, placement=even_placement([0], 4, 2, replicas=2), replicas=2)


def resized(wanted: Wanted, room: Room = ROOM, **counts: int) -> Wanted:
    after, refusal = begin(Resize("op", **counts), wanted, running(wanted), room, GRACE_S)
    assert refusal == ""
    return after


def refusal(wanted: Wanted, room: Room = ROOM, **counts: int) -> str:
    _, text = begin(Resize("op", **counts), wanted, running(wanted), room, GRACE_S)
    assert text
    return text


def test_new_parts_get_the_lowest_free_numbers() -> None:
    gap = replace(TWO_SHARDS, shards=("shard-0", "shard-2"), placement=even_placement([0, 1], 4, 1))
    assert resized(gap, room=replace(ROOM, slots=5), shards=4).shards == ("shard-0", "shard-1", "shard-2", "shard-3")
    assert resized(gap, room=replace(ROOM, slots=5), routers=2).routers == ("router-0", "router-1")


def test_the_highest_numbers_go_and_first_those_that_do_not_run() -> None:
    assert resized(REPLICAS, routers=1).released == {"router-1": GRACE_S}
    assert resized(REPLICAS, shards=2).released == {"shard-2": GRACE_S}
    found = {name: part for name, part in running(REPLICAS).items() if name != "shard-1"}
    after, _ = begin(Resize("op", shards=2), REPLICAS, found, ROOM, GRACE_S)
    assert after.released == {"shard-1": GRACE_S}


def test_what_is_drained_counts_for_nothing() -> None:
    wanted = replace(REPLICAS, drained={"shard-1": 9.0})
    assert resized(wanted, shards=2).released == {}
    assert resized(wanted, shards=3).shards == ("shard-0", "shard-1", "shard-2", "shard-3")
    assert 1 not in target(resized(wanted, shards=3), running(wanted), 4).used_shards


def test_without_a_number_for_shards_or_replicas_no_expert_moves() -> None:
    by_load = uniform_placement(3, {0: ((0,), (0, 1), (1,), (1,), (1,), (2,), (2,), (2,))})
    wanted = replace(REPLICAS, placement=by_load, replicas=1)
    room = replace(ROOM, slots=9)
    after = resized(wanted, room, routers=3)
    assert target(after, running(after), 9) is by_load
    drained = replace(REPLICAS, drained={"shard-1": 9.0})
    assert target(resized(drained, routers=3), running(drained), 9) is REPLICAS.placement
    assert target(resized(wanted, room, shards=4), running(wanted), 9) is not by_load


def test_routers_may_change_while_drained_shards_leave_too_few_for_the_replicas() -> None:
    wanted = replace(TWICE_ON_TWO, drained={"shard-1": 9.0})
    assert resized(wanted, ROOM6, routers=2).routers == ("router-0", "router-1")
    assert "replicas is 2, and there would be 1 shard;" in refusal(wanted, ROOM6, replicas=2)


def test_a_drain_amid_a_resize_leaves_experts_where_they_are_and_is_told() -> None:
    only_routers = replace(resized(TWICE_ON_TWO, ROOM6, routers=2), drained={"shard-1": 9.0})
    found = {name: part for name, part in running(only_routers).items() if name != "shard-1"}
    assert target(only_routers, found, 6) is TWICE_ON_TWO.placement
    assert waits_for(only_routers, found) == ""
    once = replace(TWICE_ON_TWO, placement=even_placement([0], 4, 2), replicas=1)
    more_copies = replace(resized(once, ROOM6, replicas=2), drained={"shard-1": 9.0})
    assert target(more_copies, found, 6) is once.placement
    assert waits_for(more_copies, found) == "2 replicas wait for 2 shards, and 1 stays: undrain shard-1"


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ({}, "no number is given"),
        ({"routers": 0}, "routers is 0; it must be at least 1"),
        ({"shards": 5}, "shards is 5; the model has 4 experts, so it must be from 1 to 4"),
        ({"replicas": 3}, "replicas is 3, and there would be 2 shards"),
        (
            {"shards": 1},
            r"1 shard holds 1 \* 3 experts of a layer \(one of their 4 slots .*has 4; 2 shards would do",
        ),
        ({"routers": 40}, "no other node has room for router-.*, which needs 0.5 CPU; add a node"),
    ],
)
def test_what_cannot_work_is_refused_with_the_number_that_does_not_fit(counts: dict[str, int], text: str) -> None:
    assert re.search(text, refusal(TWO_SHARDS, **counts))


def test_with_an_autoscaler_a_new_part_may_wait_for_a_node() -> None:
    wanted = resized(TWO_SHARDS, room=replace(ROOM, free={}, can_grow=True), shards=3)
    found = running(TWO_SHARDS) | {"shard-2": Found(None, is_ready=False)}
    assert waits_for(wanted, found) == "shard-2 waits for a node"


def test_a_part_that_was_there_at_the_start_has_its_place() -> None:
    assert resized(TWO_SHARDS, room=replace(ROOM, free={}, reserved=frozenset({"shard-2"})), shards=3)


def test_a_dense_model_has_no_shards_to_change() -> None:
    dense = Wanted(("router-0",), (), even_placement([], 0, 0))
    assert "dense" in refusal(dense, shards=2)
    assert resized(dense, routers=2).routers == ("router-0", "router-1")


def test_the_same_operation_goes_on_and_another_is_refused_by_name() -> None:
    wanted = resized(TWO_SHARDS, shards=3)
    assert begin(Resize("op", shards=3), wanted, {}, ROOM, GRACE_S) == (wanted, "")
    assert "op is under way as 3 shards" in begin(Resize("op", shards=4), wanted, {}, ROOM, GRACE_S)[1]
    assert "operation op (3 shards) is under way" in begin(Resize("other", routers=2), wanted, {}, ROOM, GRACE_S)[1]


def test_an_aborted_resize_goes_back_to_what_was() -> None:
    up, text = abort(resized(TWO_SHARDS, shards=3, routers=2), "op", "as was asked for", GRACE_S)
    assert (text, up.released) == ("", {"shard-2": GRACE_S, "router-1": GRACE_S})
    down, _ = abort(resized(REPLICAS, shards=2, replicas=1), "op", "as was asked for", GRACE_S)
    assert (down.released, down.shards, down.replicas) == ({}, REPLICAS.shards, REPLICAS.replicas)
    assert "op2 does not run; op does" in abort(up, "op2", "", GRACE_S)[1]


@pytest.mark.parametrize(("shards", "routers"), [(3, 2), (4, 1), (2, 3)])
def test_it_gets_there_step_by_step(shards: int, routers: int) -> None:
    """Parts do as they are told; the placement changes as soon as all its shards are ready."""
    begun = replace(REPLICAS, replicas=2, placement=even_placement([0, 1], 4, 3, replicas=2))
    wanted, found = resized(begun, ROOM6, shards=shards, routers=routers), running(REPLICAS)
    for _ in range(30):
        actions = reconcile(wanted, found)
        placement = target(wanted, found, ROOM6.slots)
        if not actions and placement is wanted.placement and not waits_for(wanted, found):
            break
        found = {name: replace(part, is_ready=True, is_idle=True) for name, part in found.items()}
        ready = {f"shard-{number}" for number in placement.used_shards} <= found.keys()
        wanted = replace(wanted, placement=placement) if ready else wanted
        for action in actions:
            match action:
                case Create(part):
                    found[part] = Found("b", is_ready=False, orders=Orders() if part in wanted.routers else None)
                case Tell(router, orders):
                    found[router] = replace(found[router], orders=orders)
                case Kill(part):
                    assert part not in {f"shard-{number}" for number in wanted.placement.used_shards}
                    del found[part]
                case Forget(part):
                    wanted = forgotten(part, wanted)
    assert (len(wanted.shards), len(wanted.routers)) == (shards, routers)
    assert {*found} == {*wanted.parts}
    assert wanted.placement.used_shards == {*range(shards)}

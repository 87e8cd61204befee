"""A change of placement, phase by phase, and what is refused."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from cluster.policy.change import (
    COMMIT,
    FAILURES,
    PREPARE,
    RETIRE,
    Change,
    Hold,
    PlacementState,
    Plan,
    Route,
    abort,
    begin,
    recovered,
)
from cluster.policy.wanted import Found, Held
from experts.placement import uniform_placement

NOW = uniform_placement(2, {1: ((0,), (1,))})
TARGET = uniform_placement(2, {1: ((0, 1), (1,))})
BOTH = frozenset({"router-0"})


def seen(order: int = 1, missing: int = 0, epoch: int | None = 1, **changes: object) -> dict[str, Found]:
    """A router and two shards. epoch: None: the router does not answer. changes: of what shards hold."""
    held = replace(Held(order, missing, BOTH), **changes)  # type: ignore[arg-type]
    return {
        "router-0": Found("node", epoch is not None, epoch=epoch),
        **{f"shard-{number}": Found("node", held=held) for number in range(2)},
    }


def changing(*, slots: int = 3) -> Plan:
    state, refusal = begin(
        Plan(PlacementState(1, NOW), slots), Change("op", TARGET, "rebalance"), {"shard-0", "shard-1"}
    )
    assert refusal == ""
    return Plan(state, slots, {1: 7})


def test_a_change_prepares_commits_and_retires() -> None:
    plan = changing()
    assert (plan.phase(seen()), plan.steps_left) == (PREPARE, 1)
    assert plan.tells(seen()) == [Hold("shard-0", 2, {(1, 0): 1}), Hold("shard-1", 2, {(1, 1): 1, (1, 0): 1})]
    assert plan.waits_for(seen()) == "shard-1 is to be told of 1 more experts"
    assert plan.next_state(seen(2, missing=1)) is plan.state
    assert plan.waits_for(seen(2, missing=1)) == "shard-1 has 1 experts to read"

    committed = Plan(plan.next_state(seen(2)), 3)
    assert committed.state.current.shards_of == TARGET.shards_of
    assert (committed.state.current.epoch, committed.state.previous) == (2, NOW)
    assert committed.phase(seen(2)) == COMMIT
    assert committed.tells(seen(3)) == [Route("router-0", committed.state.current)]
    assert committed.next_state(seen(3)) is committed.state
    assert committed.waits_for(seen(3)) == "router-0 has steps under way by the placement before"
    assert committed.phase(seen(3, epoch=2)) == RETIRE

    retired = Plan(committed.next_state(seen(3, epoch=2)), 3)
    assert retired.state.previous is None
    done = retired.next_state(seen(4, epoch=2))
    assert done.is_settled
    assert done.ended is not None
    assert (done.ended.outcome, done.ended.steps_done, done.ended.moved_bytes) == ("done", 1, 7)


def test_a_silent_router_is_waited_for_while_a_shard_may_be_linked_to_it() -> None:
    plan = Plan(changing().next_state(seen(2)), 3)
    assert plan.next_state(seen(3, epoch=None)) is plan.state
    assert "router-0 does not answer" in plan.waits_for(seen(3, epoch=None))
    found = seen(3, epoch=None, links=frozenset())
    assert plan.next_state({**found, "shard-0": Found("node")}) is plan.state  # one that is silent may be linked
    assert plan.next_state(found).previous is None


def test_a_step_is_not_routed_before_its_shards_are_linked() -> None:
    found = seen(2, links=frozenset())
    assert changing().next_state(found).previous is None
    assert changing().waits_for(found) == "shard-1 is not linked to router-0 yet"


def test_a_shard_that_cannot_read_ends_the_change() -> None:
    problem = "the file is truncated"
    assert changing().next_state(seen(2, 1, problem=problem, failures=FAILURES - 1)).change is not None
    ended = changing().next_state(seen(2, 1, problem=problem, failures=FAILURES)).ended
    assert ended is not None
    assert ended.outcome == "aborted: shard-1: the file is truncated"


def test_a_shard_that_is_to_gain_and_is_drained_meanwhile_ends_the_change() -> None:
    assert changing().next_state(seen(2)).previous is not None
    ended = changing().next_state(seen(2), {"shard-1"}).ended
    assert ended is not None
    assert ended.outcome == "aborted: expert 1 of layer 1 would be on shard-1 alone, which is drained"


def test_a_step_never_leaves_an_expert_on_drained_shards_alone() -> None:
    """The drain was accepted because shard-1 has a copy, too; the change would take that one away."""
    both = Plan(PlacementState(1, TARGET), 3)
    state, refusal = begin(both, Change("op", NOW, "rebalance"), {"shard-0", "shard-1"})
    assert refusal == ""
    ended = Plan(state, 3).next_state(seen(2), {"shard-0"}).ended
    assert ended is not None
    assert ended.outcome == "aborted: expert 0 of layer 1 would be on shard-0 alone, which is drained"
    state, refusal = begin(both, Change("op", NOW, "rebalance"), {"shard-0", "shard-1"}, {"shard-0"})
    assert state is both.state
    assert refusal.startswith("expert 0 of layer 1 would be on shard-0 alone, which is drained; undo the drain")


def test_progress_changes_as_a_step_gets_nearer() -> None:
    plan = changing()
    assert Plan(PlacementState(1, NOW), 3).progress(seen()) is None
    assert plan.progress(seen(2, 1)) == plan.progress(seen(2, 1))
    assert plan.progress(seen(2, 1)) != plan.progress(seen(2, 0))


def test_what_was_committed_stays_after_an_abort() -> None:
    committed = changing().next_state(seen(2))
    state, refusal = abort(committed, "op")
    assert (refusal, state.current, state.previous, state.change) == ("", committed.current, NOW, None)
    assert abort(state, "op")[1] == "operation op is not under way; none is"


def test_one_change_is_under_way_at_a_time() -> None:
    plan, shards = changing(), {"shard-0", "shard-1"}
    again, refusal = begin(plan, Change("op", replace(TARGET, epoch=9), "rebalance"), shards)
    assert (again, refusal) == (plan.state, "")
    for change, reason in (
        (Change("other", TARGET, "resize"), "operation op (rebalance) is under way; wait for it, or abort it"),
        (Change("op", NOW, "rebalance"), "operation op is under way to another target; wait for it, or abort it"),
    ):
        assert begin(plan, change, shards) == (plan.state, reason)
    assert abort(plan.state, "other")[1] == "operation other is not under way; op (rebalance) is"


def test_what_is_so_already_is_done_at_once() -> None:
    state, refusal = begin(Plan(PlacementState(1, NOW), 3), Change("op", NOW, "rebalance"), {"shard-0", "shard-1"})
    assert refusal == ""
    assert state.is_settled
    assert state.ended is not None
    assert state.ended.outcome == "done"


@pytest.mark.parametrize(
    ("drained", "slots", "reason"),
    [
        ({"shard-1"}, 3, "shard-1 is drained, and the target gives it more experts"),
        (set[str](), 2, "shard 1 would hold 2 experts of layer 1; of its 2 slots one is for moving, so at most 1 fit"),
    ],
)
def test_what_cannot_be_is_refused(drained: set[str], slots: int, reason: str) -> None:
    plan = Plan(PlacementState(1, NOW), slots)
    state, refusal = begin(plan, Change("op", TARGET, "rebalance"), {"shard-0", "shard-1"}, drained)
    assert state is plan.state
    assert refusal.startswith(reason)


Lost = Callable[[], dict[str, Found]]


@pytest.mark.parametrize("lost", [lambda: seen(7), lambda: seen(7, epoch=5)])
def test_orders_go_on_from_those_that_were_told_before_the_store_was_lost(lost: Lost) -> None:
    state = Plan(recovered(NOW, [], 1), 3).next_state(lost())
    assert state.revision == 8
    epoch = lost()["router-0"].epoch
    assert state.current.epoch == (1 if epoch == 1 else 6)


def test_what_routers_route_counts_when_nothing_is_stored() -> None:
    newer = replace(TARGET, epoch=4)
    state = recovered(NOW, [replace(NOW, epoch=3), newer], 1)
    assert (state.current, state.previous) == (newer, replace(NOW, epoch=3))
    assert recovered(NOW, [], 1) == PlacementState(1, NOW)

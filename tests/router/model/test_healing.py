"""Shards that die, freeze, lag, refuse and fail amid a step: the same step goes on, with the same result."""

from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
import torch

from experts.errors import ComputeFailed, NotHeld
from experts.link_table import LinkTable
from experts.placement import Placement, even_placement
from router.model.dispatch import Dispatcher, TokensFailed
from router.model.shard_speed import FIRST_DEADLINE_S, FIRST_TRY_S, LAST_TRY_S, LATE_IN_A_ROW
from tests.router.faulty_shards import DEAD_AFTER_S, LATENCY_S, FakeTime, FaultyShard
from tests.router.model.clusters import (
    CPU,
    EXPERTS,
    HIDDEN,
    LAYER,
    OTHER_LAYER,
    assert_plain,
    choose,
    make_shard,
    plain_formula,
    random,
    scores_for,
)

HEAL_S = 20.0


@dataclass
class Faulty:
    """A dispatcher over shards that can be made to fail."""

    replicas: int = 2
    num_shards: int = 3
    heal_s: float = HEAL_S
    placement: Placement = field(init=False)

    def __post_init__(self) -> None:
        self.placement = even_placement([LAYER, OTHER_LAYER], EXPERTS, self.num_shards, replicas=self.replicas)
        self.time = FakeTime()
        self.table = LinkTable(bell=self.time, clock=self.time)
        self.shards = [
            FaultyShard(number, make_shard(self.placement, number), self.table, self.time)
            for number in range(self.num_shards)
        ]
        self.dispatcher = Dispatcher(self.placement, self.table, CPU, self.heal_s, self.time)

    def seconds(self, tokens: int = 30) -> float:
        """Run a step in which every shard is asked, check its result, and tell how long it took."""
        began_s = self.time.now_s
        assert_plain(self.dispatcher, choose(tokens, 2))
        return self.time.now_s - began_s

    def tokens_on(self, shard: int, tokens: int = 30) -> list[int]:
        """Those of a step's tokens whose experts only this shard holds."""
        held = {expert for expert, shards in enumerate(self.placement.shards_of[LAYER]) if shards == (shard,)}
        return [token for token in range(tokens) if held & set(choose(tokens, 2)[token].tolist())]

    @property
    def retries(self) -> dict[str, int]:
        return dict(self.dispatcher.asker.retries)


def test_without_a_fault_nothing_is_asked_twice() -> None:
    faulty = Faulty()
    assert faulty.seconds() == pytest.approx(LATENCY_S, rel=0.1)
    assert faulty.retries == {}


@pytest.mark.parametrize("after", ["before it takes the rows", "after it took them"])
def test_a_shard_that_dies_amid_a_step_costs_one_more_round_trip(after: str) -> None:
    faulty = Faulty()
    shard = faulty.shards[1]
    if after == "after it took them":
        faulty.time.after(LATENCY_S / 2, lambda: shard.kill(None))
    else:
        shard.arm(1, lambda: shard.kill(None))
    assert faulty.seconds() < 3 * LATENCY_S
    assert faulty.retries == {"lost": 1}
    assert faulty.seconds() < 2 * LATENCY_S  # nothing more is asked of it
    assert faulty.dispatcher.missing_experts() == 0


def test_two_of_three_may_die_if_there_are_three_replicas() -> None:
    faulty = Faulty(replicas=3)
    for number in (0, 2):
        faulty.shards[number].arm(1, lambda number=number: faulty.shards[number].kill(None))
    assert faulty.seconds() < 4 * LATENCY_S


@pytest.mark.parametrize("loading_s", [0.0, 3.0], ids=["loaded", "loading"])
def test_without_a_replica_the_step_waits_for_the_replacement_which_may_still_load(loading_s: float) -> None:
    faulty = Faulty(replicas=1)
    faulty.shards[1].arm(1, lambda: faulty.shards[1].kill(4.0, loading_s))
    assert 4.0 <= faulty.seconds() < 4.2
    assert faulty.retries.get("late", 0) == 0


def test_a_shard_that_loads_is_spared_while_another_holds_its_experts() -> None:
    faulty = Faulty()
    faulty.shards[1].kill(0.0, loading_s=5.0)
    faulty.time.pass_by(1.0)
    asked_before = faulty.shards[1].requests
    faulty.seconds()
    assert faulty.shards[1].requests == asked_before
    faulty.time.pass_by(5.0)
    faulty.seconds()
    assert faulty.shards[1].requests == asked_before + 1


def test_a_step_gives_up_after_heal_s_and_names_the_shard_and_why() -> None:
    faulty = Faulty(replicas=1)
    faulty.shards[1].kill(None)
    began_s = faulty.time.now_s
    with pytest.raises(TokensFailed, match=r"^expert shard 1: lost: the peer closed it$") as caught:
        faulty.seconds()
    assert HEAL_S <= faulty.time.now_s - began_s < HEAL_S + 0.2
    assert caught.value.is_away
    assert caught.value.tokens == faulty.tokens_on(1)


def test_who_waits_for_nobody_still_asks_every_replica() -> None:
    """Two shards die while they are asked, one after the other; the third one answers."""
    faulty = Faulty(replicas=3, heal_s=0.0)
    faulty.shards[0].arm(1, lambda: faulty.shards[0].kill(None))
    faulty.shards[1].arm(2, lambda: faulty.shards[1].kill(None))
    assert faulty.seconds() < 4 * LATENCY_S


def test_what_has_been_away_for_heal_s_is_not_waited_for_again() -> None:
    faulty = Faulty(replicas=1)
    faulty.shards[1].kill(HEAL_S + 1.0)
    faulty.time.pass_by(HEAL_S)
    began_s = faulty.time.now_s
    with pytest.raises(TokensFailed):
        faulty.seconds()
    assert faulty.time.now_s - began_s < 0.2
    faulty.time.pass_by(2.0)
    faulty.seconds()  # it is back
    faulty.shards[1].kill(1.0)
    assert 0.9 < faulty.seconds() < 1.2  # a new loss has its own time


def test_what_is_refused_for_heal_s_fails_alone_and_later_at_once() -> None:
    """A slice of the weights cannot be read: one expert of one shard."""
    faulty = Faulty(replicas=1)
    expert = next(e for e, [shard] in enumerate(faulty.placement.shards_of[LAYER]) if shard == 1)
    faulty.shards[1].cannot_read = expert
    for longest_s in (HEAL_S + 1.2, 1.2):
        began_s = faulty.time.now_s
        with pytest.raises(TokensFailed) as caught:
            faulty.seconds()
        assert faulty.time.now_s - began_s < longest_s
        assert caught.value.is_away
        assert caught.value.tokens == [t for t in range(30) if expert in choose(30, 2)[t].tolist()]
    faulty.shards[1].cannot_read = None
    assert faulty.seconds() < 1.2


def test_a_link_that_is_lost_amid_a_look_is_no_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table said a moment ago that the shard is linked."""
    faulty = Faulty(replicas=1)
    monkeypatch.setattr(faulty.table, "down_since_s", lambda shard: None)
    faulty.shards[1].kill(1.0)
    assert 0.9 < faulty.seconds() < 1.2


class Enough(Exception):
    pass


def test_whoever_waits_looks_around_and_can_be_ended() -> None:
    faulty = Faulty(replicas=1)
    faulty.shards[1].kill(None)
    looked_s: list[float] = []

    def look() -> None:
        looked_s.append(faulty.time.now_s)
        if len(looked_s) == 50:
            raise Enough

    faulty.dispatcher.asker.while_waiting = look
    with pytest.raises(Enough):
        faulty.seconds()
    assert max(later - earlier for earlier, later in pairwise(looked_s)) < 0.11


def test_a_late_shard_is_hedged_and_one_that_is_always_late_is_drained() -> None:
    faulty = Faulty()
    for _ in range(20):
        faulty.seconds()
    slow = faulty.shards[1]
    slow.slowness = 1000.0
    for late in range(LATE_IN_A_ROW):
        assert faulty.seconds() < 0.1  # far less than its second
        assert faulty.retries["late"] == late + 1
    asked_before = slow.requests
    for _ in range(20):
        assert faulty.seconds() < 2 * LATENCY_S
    assert slow.requests == asked_before
    assert set(faulty.dispatcher.asker.slowness()) == {1}


def test_a_slow_shard_is_tried_ever_more_seldom_and_used_again_once_it_is_quick() -> None:
    faulty = Faulty()
    for _ in range(20):
        faulty.seconds()
    slow = faulty.shards[1]
    slow.slowness = 1000.0
    began_s, asked_before = faulty.time.now_s, slow.requests
    while faulty.time.now_s < began_s + 10 * LAST_TRY_S:
        faulty.seconds()
        faulty.time.pass_by(0.05)
    assert LATE_IN_A_ROW + 10 <= slow.requests - asked_before <= LATE_IN_A_ROW + 17
    slow.slowness = 1.0
    faulty.time.pass_by(LAST_TRY_S)
    asked_before = slow.requests
    for _ in range(20):
        faulty.seconds()
    assert slow.requests >= asked_before + 19
    assert faulty.dispatcher.asker.slowness() == {}


@pytest.mark.parametrize("pause_s", [0.06, 0.3, 0.45])
def test_one_hiccup_does_not_take_a_shard_out(pause_s: float) -> None:
    faulty = Faulty()
    for _ in range(20):
        faulty.seconds()
    shard = faulty.shards[1]
    shard.arm(1, lambda: shard.freeze(pause_s))
    faulty.seconds()
    faulty.time.pass_by(FIRST_TRY_S)
    asked_before = shard.requests
    for _ in range(20):
        faulty.seconds()
    assert shard.requests >= asked_before + 19


def test_a_router_that_was_stopped_itself_blames_nobody() -> None:
    faulty = Faulty()
    for _ in range(20):
        faulty.seconds()
    for _ in range(3):
        faulty.time.oversleeps_s = 5.0
        faulty.seconds()
    assert faulty.retries == {}
    assert faulty.dispatcher.asker.slowness() == {}


def test_a_shard_of_which_nothing_is_known_is_hedged_after_a_second() -> None:
    faulty = Faulty()
    faulty.shards[1].slowness = 1e6
    assert faulty.seconds() == pytest.approx(FIRST_DEADLINE_S, rel=0.1)


def test_a_frozen_shard_costs_less_than_the_time_after_which_it_counts_as_dead() -> None:
    faulty = Faulty()
    for _ in range(20):
        faulty.seconds()
    faulty.shards[1].arm(1, lambda: faulty.shards[1].freeze(10.0))
    assert faulty.seconds() < DEAD_AFTER_S / 4


def test_without_a_replica_a_slow_shard_is_waited_for_as_long_as_it_takes() -> None:
    faulty = Faulty(replicas=1)
    faulty.shards[1].slowness = 2 * HEAL_S / LATENCY_S
    assert faulty.seconds() == pytest.approx(2 * HEAL_S, rel=0.01)
    assert faulty.retries == {}


def test_what_a_shard_does_not_hold_is_asked_of_another_and_later_of_it_again() -> None:
    faulty = Faulty()
    faulty.shards[1].refuse(NotHeld)
    assert faulty.seconds() < 3 * LATENCY_S
    assert faulty.retries == {"not_held": 1}
    alone = Faulty(replicas=1)
    alone.shards[1].refuse(NotHeld)
    assert alone.seconds() < 3 * LATENCY_S  # its experts are asked for one by one, in case only one is missing


def test_a_shard_that_comes_back_with_old_weights_computes_nothing() -> None:
    faulty = Faulty()
    old = make_shard(replace(faulty.placement, versions_of={LAYER: (0,) * EXPERTS, OTHER_LAYER: (0,) * EXPERTS}), 1)
    faulty.shards[1].kill(0.1)
    faulty.shards[1]._shard = old
    faulty.time.pass_by(0.2)
    faulty.seconds()
    assert set(faulty.retries) == {"not_held"}
    assert old.rows_computed == 0


def test_an_answer_that_comes_after_its_link_has_ended_is_not_taken() -> None:
    """The shard died, in the router's eyes, while its answer was on the way; another one's counts."""
    faulty = Faulty()
    for _ in range(5):
        faulty.seconds()
    shard = faulty.shards[1]
    shard.slowness = 3.0
    faulty.time.after(2 * LATENCY_S, lambda: shard.kill(None))
    assert faulty.seconds() < 4 * LATENCY_S
    assert faulty.retries == {"lost": 1}


@pytest.mark.parametrize("replicas", [1, 2])
def test_what_fails_once_is_computed_elsewhere_or_again(replicas: int) -> None:
    faulty = Faulty(replicas)
    faulty.shards[1].refuse(ComputeFailed)
    assert faulty.seconds() < 3 * LATENCY_S
    assert faulty.retries == {"compute_failed": 1}


def test_what_fails_twice_fails_only_the_tokens_whose_rows_it_were() -> None:
    faulty = Faulty(replicas=1)
    shard = faulty.shards[1]
    shard.refuse(ComputeFailed)
    shard.arm(2, lambda: shard.refuse(ComputeFailed))  # the first of its experts, asked for by itself
    x_TD, expert_TA = random(30, HIDDEN), choose(30, 2)
    dispatcher = faulty.dispatcher
    with pytest.raises(TokensFailed, match="expert shard 1: as the test wants it") as caught:
        dispatcher.combine(dispatcher.dispatch(LAYER, x_TD, expert_TA, scores_for(expert_TA)))
    assert not caught.value.is_away
    first = next(expert for expert, [holder] in enumerate(faulty.placement.shards_of[LAYER]) if holder == 1)
    assert caught.value.tokens == [token for token in range(30) if first in expert_TA[token].tolist()]
    left = [token for token in range(30) if token not in caught.value.tokens]
    y_TD = dispatcher.combine(dispatcher.dispatch(LAYER, x_TD[left], expert_TA[left], scores_for(expert_TA)[left]))
    expected_TD = plain_formula(x_TD, expert_TA)[left]
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-5, atol=1e-5)


def test_a_drained_shard_is_asked_only_for_what_no_other_holds() -> None:
    faulty = Faulty()
    faulty.table.drain([1])
    faulty.seconds()
    assert faulty.shards[1].requests == 0
    lonely = Faulty(replicas=1)
    lonely.table.drain([1])
    lonely.seconds()
    assert lonely.shards[1].requests == 1

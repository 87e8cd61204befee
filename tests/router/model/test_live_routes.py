"""A router whose placement changes: between two steps, never amid one."""

from dataclasses import replace

import pytest
import torch

from experts.link_table import LinkTable
from experts.placement import Placement, uniform_placement
from router.model.dispatch import Dispatcher
from tests.router.model.clusters import (
    EXPERTS,
    HIDDEN,
    LAYER,
    OTHER_LAYER,
    DownLink,
    RecordingLink,
    assert_plain,
    choose,
    make_shard,
    random,
    run,
    scores_for,
)


def all_on(shard: int, epoch: int, num_shards: int = 2) -> Placement:
    by_expert = ((shard,),) * EXPERTS
    return uniform_placement(num_shards, {LAYER: by_expert, OTHER_LAYER: by_expert}, epoch=epoch)


EVERYWHERE = uniform_placement(3, dict.fromkeys((LAYER, OTHER_LAYER), ((0, 1, 2),) * EXPERTS))


class Moving:
    """A dispatcher and three shards that hold everything; it begins with all experts on shard 0."""

    def __init__(self, heal_s: float = 0.0) -> None:
        self.links = [RecordingLink(make_shard(EVERYWHERE, number)) for number in range(3)]
        self.table = LinkTable(dict(enumerate(self.links)))
        self.dispatcher = Dispatcher(all_on(0, 1), self.table, heal_s=heal_s)

    def asked(self) -> list[int]:
        """How often each shard was asked since the last call."""
        counts = [len(link.carried) for link in self.links]
        for link in self.links:
            link.carried.clear()
        return counts


def test_the_step_after_is_routed_by_the_new_placement_and_computes_the_same() -> None:
    moving, x_TD, expert_TA = Moving(), random(9, HIDDEN), choose(9, 1)
    with moving.dispatcher.step():
        before = run(moving.dispatcher, x_TD, expert_TA)
    moving.dispatcher.route(all_on(1, 2))
    with moving.dispatcher.step():
        assert torch.equal(run(moving.dispatcher, x_TD, expert_TA), before)
    assert moving.asked() == [1, 1, 0]


def test_a_step_keeps_its_placement_to_its_end_and_says_so() -> None:
    moving, expert_TA = Moving(), choose(5, 1)
    with moving.dispatcher.step():
        assert_plain(moving.dispatcher, expert_TA)
        moving.dispatcher.route(all_on(1, 2))
        assert (moving.dispatcher.epoch, moving.dispatcher.placement.epoch) == (1, 2)
        assert moving.dispatcher.in_use == (all_on(1, 2), all_on(0, 1))
        assert_plain(moving.dispatcher, expert_TA, OTHER_LAYER)
        assert moving.asked() == [2, 0, 0]
    assert moving.dispatcher.epoch == 2
    assert_plain(moving.dispatcher, expert_TA)
    assert moving.asked() == [0, 1, 0]


def test_an_idle_router_follows_at_once() -> None:
    moving = Moving()
    moving.dispatcher.route(all_on(1, 2))
    assert moving.dispatcher.epoch == 2
    assert moving.dispatcher.needed_shards == {1}


def test_shards_may_become_more_and_fewer() -> None:
    moving = Moving()
    moving.dispatcher.route(all_on(2, 2, num_shards=3))
    assert_plain(moving.dispatcher, choose(5, 1))
    moving.dispatcher.route(all_on(1, 3))
    assert_plain(moving.dispatcher, choose(5, 1))
    assert moving.asked() == [0, 1, 1]
    assert moving.dispatcher.asker.rows_of_shard == {1: 5, 2: 5}


def test_what_is_older_than_the_newest_is_ignored() -> None:
    moving = Moving()
    moving.dispatcher.route(all_on(1, 3))
    moving.dispatcher.route(all_on(2, 2))
    assert (moving.dispatcher.placement, moving.dispatcher.epoch) == (all_on(1, 3), 3)


def test_a_step_that_has_ended_badly_has_ended() -> None:
    moving = Moving()

    def fail() -> None:
        with moving.dispatcher.step():
            moving.dispatcher.route(all_on(1, 2))
            raise RuntimeError("amid a step")

    with pytest.raises(RuntimeError, match="amid a step"):
        fail()
    assert moving.dispatcher.epoch == 2


def test_a_shard_that_is_lost_and_linked_anew_counts_by_the_new_placement_too() -> None:
    moving, expert_TA = Moving(), choose(5, 1)
    moving.dispatcher.route(replace(EVERYWHERE, epoch=2))
    moving.table.remove(0, "lost")
    assert_plain(moving.dispatcher, expert_TA)
    assert moving.asked()[0] == 0
    moving.dispatcher.route(all_on(0, 3))
    assert moving.dispatcher.missing_experts() == 2 * EXPERTS
    moving.table.replace(0, moving.links[0])
    assert_plain(moving.dispatcher, expert_TA)
    assert moving.asked() == [1, 0, 0]


def test_rows_that_are_lost_amid_a_step_are_asked_for_where_the_newest_placement_says() -> None:
    moving, x_TD, expert_TA = Moving(heal_s=60.0), random(5, HIDDEN), choose(5, 1)
    with moving.dispatcher.step():
        expected = run(moving.dispatcher, x_TD, expert_TA)
    moving.table.replace(0, DownLink(takes_rows=True))
    with moving.dispatcher.step():
        handle = moving.dispatcher.dispatch(LAYER, x_TD, expert_TA, scores_for(expert_TA))
        moving.dispatcher.asker.while_waiting = lambda: moving.dispatcher.route(all_on(1, 2))
        assert torch.equal(moving.dispatcher.combine(handle), expected)
    assert moving.asked() == [1, 1, 0]

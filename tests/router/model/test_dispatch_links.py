"""The same over a real link, between two ends of one process."""

from collections.abc import Iterator

import pytest
import torch

from experts.bell import ThreadBell
from experts.endpoint import Liveness
from experts.group_link import GroupLink
from experts.link_table import LinkTable
from experts.placement import uniform_placement
from experts.shard_server import ShardServer
from experts.wire import WireFormat
from router.model.dispatch import Dispatcher, TokensFailed
from tests.experts.ends import join_both
from tests.router.model.clusters import (
    CPU,
    EXPERTS,
    HIDDEN,
    LAYER,
    DownLink,
    assert_plain,
    choose,
    even,
    make_dispatcher,
    make_shard,
    random,
    run,
)

LIVENESS = Liveness(heartbeat_s=0.1, silence_s=20.0)


@pytest.fixture
def group_link() -> Iterator[GroupLink]:
    """A link to a real server of shard 0 of two."""
    router_end, shard_end = join_both()
    wire = WireFormat(max_groups=EXPERTS, max_rows=64, hidden_size=HIDDEN, dtype=torch.float32)
    server = ShardServer(make_shard(even(2), 0), CPU)
    server.serve(shard_end, wire, LIVENESS, "dispatch")
    link = GroupLink(router_end, wire, LIVENESS, ThreadBell(), CPU, "dispatch")
    yield link
    link.close()
    server.close()


def test_a_group_link_carries_what_a_local_link_does(group_link: GroupLink) -> None:
    local, links = make_dispatcher(even(2))
    mixed = Dispatcher(even(2), LinkTable({0: group_link, 1: links[1]}))
    x_TD, expert_TA = random(30, HIDDEN), choose(30, 2)
    assert torch.equal(run(mixed, x_TD, expert_TA), run(local, x_TD, expert_TA))


GIVEN_UP: dict[str, tuple[int, DownLink]] = {
    "while dispatching": (0, DownLink()),  # the living shard has its rows when the dead one is asked
    "while combining": (1, DownLink(takes_rows=True)),  # the dead shard is waited for before the living one
}


@pytest.mark.parametrize("when", GIVEN_UP)
def test_a_step_given_up_leaves_nothing_behind_in_the_links_that_are_well(group_link: GroupLink, when: str) -> None:
    living, dead_link = GIVEN_UP[when]
    placement = uniform_placement(2, {LAYER: ((living,),) * 4 + ((1 - living,),) * 4})
    dispatcher = Dispatcher(placement, LinkTable({living: group_link, 1 - living: dead_link}))
    for _ in range(3):
        with pytest.raises(TokensFailed):
            run(dispatcher, random(2, HIDDEN), torch.tensor([[0], [7]]))
    assert_plain(dispatcher, choose(5, 1, among=range(4)))  # answers come in order: the earlier ones have come, too
    assert len(group_link._awaited) == 0

"""The thread that keeps a link is supervised: whatever goes wrong in it, the shard is linked again."""

import threading
from typing import Any

import torch

from cluster.actors.link_keeper import LinkKeeper, LinkSettings
from experts.endpoint import Liveness
from experts.group_link import GroupLink
from experts.link_table import NOT_LINKED, LinkTable
from experts.wire import WireFormat
from tests.experts.ends import join_both
from tests.processes import PATIENCE_S, wait_until

WIRE = WireFormat(max_groups=2, max_rows=4, hidden_size=8, dtype=torch.float32)
LIVENESS = Liveness(heartbeat_s=0.1, silence_s=PATIENCE_S)
SETTINGS = LinkSettings(WIRE, LIVENESS, LIVENESS)


class ClumsyLink(GroupLink):
    """Fails when it is closed, which happens outside of all that is expected to fail."""

    def close(self) -> None:
        super().close()
        raise OSError("oh")


class Keeper(LinkKeeper):
    """Forms links within this process. The first two are clumsy."""

    def __init__(self, table: LinkTable) -> None:
        self.names: list[str] = []
        self.formed: list[GroupLink] = []
        self.peers: list[Any] = []
        super().__init__(table, lambda: {0}, lambda name: None, SETTINGS, "router", torch.device("cpu"))
        self.want(["shard-0"])

    def _form(self, shard: int, shard_name: str, link_name: str, kept: Any) -> GroupLink:
        near, far = join_both()
        self.peers.append(far)
        self.names.append(link_name)
        make = ClumsyLink if len(self.formed) < 2 else GroupLink
        self.formed.append(make(near, WIRE, LIVENESS, self._links.bell, torch.device("cpu"), link_name))
        return self.formed[-1]


def test_a_shard_is_linked_again_whatever_went_wrong_with_its_last_link() -> None:
    table = LinkTable()
    keeper = Keeper(table)
    for place in range(2):
        wait_until(lambda linked=place + 1: len(keeper.formed) == linked and table.down_reason(0) is None)
        keeper.peers[place].close()
    wait_until(lambda: len(keeper.formed) == 3 and table.down_reason(0) is None)
    assert table.link(0) is keeper.formed[2]


def test_link_names_never_repeat_not_even_when_the_router_has_started_anew() -> None:
    """A shard may still have the old router's link of that name."""
    keepers = [Keeper(LinkTable()) for _ in range(2)]
    wait_until(lambda: all(keeper.names for keeper in keepers))
    assert len({keeper.names[0] for keeper in keepers}) == 2


class Nowhere(LinkKeeper):
    """Its shards are gone for good; it needs shard 0."""

    def __init__(self, table: LinkTable) -> None:
        super().__init__(table, lambda: {0}, self._find, SETTINGS, "router", torch.device("cpu"))
        self.looked_for: list[str] = []
        self.want(["shard-0"])

    def _find(self, name: str) -> Any:
        self.looked_for.append(name)
        raise ValueError(name)


def test_a_router_that_starts_does_not_wait_for_a_drained_shard() -> None:
    table = LinkTable()
    keeper = Nowhere(table)
    waiting = threading.Thread(target=keeper.wait_until_all_were_loaded, daemon=True)
    waiting.start()
    assert keeper.never_linked == {0}
    assert waiting.is_alive()
    table.drain([0])
    waiting.join(PATIENCE_S)
    assert not waiting.is_alive()
    assert not keeper.never_linked
    table.drain([])  # wanted again: it may take its time
    assert not keeper.never_linked


def test_nobody_waits_for_a_shard_that_is_not_needed() -> None:
    """A new one may wait for a node, and holds nothing yet."""
    table = LinkTable()
    keeper = Nowhere(table)
    table.drain([0])
    keeper.want(["shard-0", "shard-2"])
    wait_until(lambda: "shard-2" in keeper.looked_for)
    assert not keeper.never_linked
    keeper.wait_until_all_were_loaded()


def test_shards_come_and_go_while_others_stay_linked() -> None:
    table = LinkTable()
    keeper = Keeper(table)
    wait_until(lambda: table.down_reason(0) is None)
    kept = table.link(0)
    keeper.want(["shard-0", "shard-2"])
    wait_until(lambda: table.down_reason(2) is None)
    gone = table.link(2)
    keeper.want(["shard-0"])
    assert {*table.use_of} == {0}
    assert (table.down_reason(2), sum(table.losses.values())) == (NOT_LINKED, 0)
    wait_until(lambda: gone.down_reason is not None)
    assert table.link(0) is kept
    assert kept.down_reason is None


def test_a_forgotten_shard_is_looked_for_no_more_and_its_thread_ends() -> None:
    keeper = Nowhere(LinkTable())
    keeper.want(["shard-0", "shard-1"])
    wait_until(lambda: "shard-1" in keeper.looked_for)
    keeper.want(["shard-0"])
    wait_until(lambda: "keep shard-1" not in {thread.name for thread in threading.enumerate()})
    assert keeper._links.down_reason(1) == NOT_LINKED


def test_a_shard_that_comes_back_gets_a_link_of_its_own_and_the_old_one_touches_it_no_more() -> None:
    table = LinkTable()
    keeper = Keeper(table)
    wait_until(lambda: table.down_reason(0) is None)
    keeper.want([])
    keeper.want(["shard-0"])
    wait_until(lambda: table.down_reason(0) is None and len(keeper.formed) == 2)
    wait_until(lambda: keeper.formed[0].down_reason is not None)
    assert table.link(0) is keeper.formed[1]
    assert len({*keeper.names}) == 2

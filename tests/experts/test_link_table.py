"""Links come and go by shard; whoever waits for that hears of every change."""

import threading
import time

import pytest
import torch

from experts.errors import LinkDown
from experts.link import LocalLink
from experts.link_table import NOT_LINKED, LinkTable, Use
from experts.shard import ExpertShard
from experts.slots import Slots
from kernels.choose import choose_kernels
from tests.processes import PATIENCE_S

KERNELS = choose_kernels(torch.device("cpu"), torch.float32, 1)


def make_link() -> LocalLink:
    return LocalLink(ExpertShard(Slots(), KERNELS))


def test_a_shard_is_reached_by_its_newest_link() -> None:
    first, second = make_link(), make_link()
    table = LinkTable({7: first})
    assert table.link(7) is first
    table.replace(7, second)
    assert table.link(7) is second
    assert table.down_reason(7) is None


def test_a_shard_without_a_link_has_a_reason_the_newest_one() -> None:
    table = LinkTable()
    assert table.down_reason(7) == NOT_LINKED
    table.remove(7, "loading")
    assert table.down_reason(7) == "loading"
    table.replace(7, make_link())
    table.remove(7, "lost")
    assert table.down_reason(7) == "lost"
    with pytest.raises(LinkDown, match=r"^lost$"):
        table.link(7)


def test_a_forgotten_shard_is_no_loss_and_leaves_no_reason() -> None:
    table = LinkTable({6: make_link(), 7: make_link()})
    table.forget(7)
    assert (table.down_reason(7), {*table.use_of}, sum(table.losses.values())) == (NOT_LINKED, {6}, 0)


class LoadingLink(LocalLink):
    """A link whose shard may still load."""

    is_loaded = False


def test_who_can_be_asked_is_a_new_object_only_when_it_changes() -> None:
    table = LinkTable({0: make_link(), 1: make_link()})
    both = table.use_of
    assert both == {0: Use.READY, 1: Use.READY}
    table.replace(1, make_link())
    assert table.use_of is both
    table.remove(1, "lost")
    alone = table.use_of
    assert alone == {0: Use.READY}
    table.remove(1, "still away")
    assert table.use_of is alone
    table.replace(5, make_link())
    assert table.use_of == {0: Use.READY, 5: Use.READY}


def test_a_shard_that_loads_or_drains_is_asked_less_gladly() -> None:
    loading = LoadingLink(ExpertShard(Slots(), KERNELS))
    table = LinkTable({0: make_link(), 1: loading})
    assert table.use_of == {0: Use.READY, 1: Use.LOADING}
    loading.is_loaded = True
    table.look_again()
    table.drain([0])
    assert table.use_of == {0: Use.DRAINING, 1: Use.READY}
    table.drain([])
    assert table.use_of == {0: Use.READY, 1: Use.READY}


def test_lost_links_are_counted_by_kind_once_each() -> None:
    table = LinkTable({0: make_link(), 1: make_link()})
    table.remove(0, "lost: the peer closed it", "lost")
    table.remove(0, "there is no such actor")
    table.remove(1, "lost: the peer was silent for 0.5 s", "silent")
    assert table.losses == {"lost": 1, "silent": 1}


@pytest.mark.parametrize("change", ["replace", "remove", "look again", "drain"])
def test_a_change_wakes_who_waits_for_it(change: str) -> None:
    table = LinkTable({0: make_link()})
    bell = table.bell
    seen, waiting = bell.rings, threading.Event()

    def wait() -> None:
        waiting.set()
        bell.wait(seen, PATIENCE_S)

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert waiting.wait(PATIENCE_S)
    {
        "replace": lambda: table.replace(0, make_link()),
        "remove": lambda: table.remove(0, "lost"),
        "look again": table.look_again,
        "drain": lambda: table.drain([0]),
    }[change]()
    waiter.join(PATIENCE_S / 2)
    assert not waiter.is_alive()


def test_a_change_before_the_wait_is_not_missed_and_a_timeout_ends_it() -> None:
    table = LinkTable()
    seen = table.bell.rings
    table.replace(0, make_link())
    began_s = time.monotonic()
    table.bell.wait(seen, PATIENCE_S)
    assert time.monotonic() - began_s < PATIENCE_S / 2
    table.bell.wait(table.bell.rings, 0.01)

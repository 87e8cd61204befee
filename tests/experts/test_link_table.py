"""Links come and go by shard; whoever waits for that hears of every change."""

import threading
import time

import pytest
import torch

from experts.errors import LinkDown
from experts.link import LocalLink
from experts.link_table import NOT_LINKED, LinkTable
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


def test_who_is_alive_is_a_new_object_only_when_it_changes() -> None:
    table = LinkTable({0: make_link(), 1: make_link()})
    both = table.alive
    table.replace(1, make_link())
    assert table.alive is both
    table.remove(1, "lost")
    alone = table.alive
    assert alone == {0}
    table.remove(1, "still away")
    assert table.alive is alone
    table.replace(5, make_link())
    assert table.alive == {0, 5}


def test_a_reason_alone_is_no_change() -> None:
    table = LinkTable({0: make_link()})
    seen = table.num_changes
    table.remove(1, "loading")
    assert table.num_changes == seen
    table.replace(0, make_link())
    table.remove(0, "lost")
    assert table.num_changes == seen + 2


@pytest.mark.parametrize("change", ["replace", "remove"])
def test_a_change_wakes_who_waits_for_it(change: str) -> None:
    table = LinkTable({0: make_link()})
    seen, waiting, heard = table.num_changes, threading.Event(), list[bool]()

    def wait() -> None:
        waiting.set()
        heard.append(table.wait_for_change(seen, time.monotonic() + PATIENCE_S))

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert waiting.wait(PATIENCE_S)
    if change == "replace":
        table.replace(0, make_link())
    else:
        table.remove(0, "lost")
    waiter.join(PATIENCE_S)
    assert heard == [True]


def test_a_change_before_the_wait_is_not_missed_and_a_deadline_ends_it() -> None:
    table = LinkTable()
    seen = table.num_changes
    table.replace(0, make_link())
    assert table.wait_for_change(seen, time.monotonic() - 1.0)
    assert not table.wait_for_change(table.num_changes, time.monotonic() + 0.01)

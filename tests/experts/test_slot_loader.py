"""A shard that loads: what is asked for comes first, and what cannot be read keeps nothing else away."""

import threading

import pytest
import torch

from experts.errors import NotHeld
from experts.placement import Slot
from experts.slot_loader import SlotLoader
from experts.slots import Slots
from kernels.choose import choose_kernels
from kernels.grouped_mlp import Expert
from tests.processes import PATIENCE_S

KERNELS = choose_kernels(torch.device("cpu"), torch.float32, 1)
EXPERT = KERNELS.expert(torch.zeros(4, 2), torch.zeros(2, 2))
WANTED = {(layer, expert): 3 for layer in (1, 5) for expert in range(3)}


class Reader:
    """Remembers what was read, in order; can be held before a slot, and fail at one."""

    def __init__(self, *, fails_at: Slot | None = None, held_at: Slot | None = None) -> None:
        self.read: list[Slot] = []
        self.fails_at, self._held_at = fails_at, held_at
        self.reached, self.go = threading.Event(), threading.Event()

    def __call__(self, slot: Slot) -> Expert:
        if slot == self._held_at:
            self.reached.set()
            assert self.go.wait(PATIENCE_S)
        if slot == self.fails_at:
            raise OSError("the disk is broken")
        self.read.append(slot)
        return EXPERT


def test_all_that_is_wanted_is_read_in_order_once() -> None:
    slots, reader = Slots(), Reader()
    loader = SlotLoader(slots, WANTED, reader)
    loader.load_all()
    loader.load_all()
    loader.load_now(1, [0, 1, 2])
    assert reader.read == list(WANTED)
    assert slots.versions() == WANTED


def test_what_is_asked_for_meanwhile_is_read_next() -> None:
    slots, reader = Slots(), Reader(held_at=(1, 0))
    loader = SlotLoader(slots, WANTED, reader)
    loading = threading.Thread(target=loader.load_all)
    loading.start()
    assert reader.reached.wait(PATIENCE_S)
    asking = threading.Thread(target=loader.load_now, args=(5, [2, 1]))
    asking.start()
    while loader._nobody_waits.is_set():
        pass
    reader.go.set()
    asking.join(PATIENCE_S)
    loading.join(PATIENCE_S)
    assert reader.read == [(1, 0), (5, 2), (5, 1), (1, 1), (1, 2), (5, 0)]


def test_what_cannot_be_read_is_not_held_and_keeps_nothing_else_away() -> None:
    slots, reader = Slots(), Reader(fails_at=(1, 1))
    loader = SlotLoader(slots, WANTED, reader)
    with pytest.raises(OSError, match="the disk is broken"):
        loader.load_all()
    assert set(slots.versions()) == WANTED.keys() - {(1, 1)}
    with pytest.raises(NotHeld, match=r"\(1, 1\) cannot be read: the disk is broken"):
        loader.load_now(1, [0, 1])
    reader.fails_at = None
    loader.load_all()
    assert slots.versions() == WANTED


def test_what_is_not_wanted_is_not_read() -> None:
    slots, reader = Slots(), Reader()
    SlotLoader(slots, WANTED, reader).load_now(2, [0])
    SlotLoader(slots, WANTED, reader).load_now(1, [7])
    assert (reader.read, len(slots)) == ([], 0)

"""A shard that loads: what is asked for comes first, and what cannot be read keeps nothing else away."""

import threading

import pytest
import torch

from experts import slot_loader
from experts.errors import NotHeld
from experts.load_pace import WORKS, LoadPace
from experts.placement import Slot
from experts.slot_loader import SlotLoader
from experts.slots import Slots
from kernels.choose import choose_kernels
from kernels.grouped_mlp import Expert
from tests.processes import PATIENCE_S, wait_until

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


class Keeper:
    """A loader whose `keep_filled` runs."""

    def __init__(self, reader: Reader, pace: LoadPace | None = None) -> None:
        self.slots = Slots()
        self.loader = SlotLoader(self.slots, WANTED, reader, pace)
        self.loader.load_all()
        self._thread = threading.Thread(target=self.loader.keep_filled)
        self._thread.start()

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(self, *_: object) -> None:
        self.loader.close()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()


MORE = {**WANTED, (7, 0): 3, (7, 1): 3}


def test_what_else_is_to_be_held_is_read_beside_the_rest() -> None:
    reader = Reader()
    with Keeper(reader) as keeper:
        keeper.loader.hold(MORE)
        wait_until(lambda: keeper.loader.missing == 0)
        assert keeper.slots.versions() == MORE
        assert reader.read[len(WANTED) :] == [(7, 0), (7, 1)]


def test_what_is_not_to_be_held_any_more_is_let_go_at_once() -> None:
    with Keeper(Reader()) as keeper:
        keeper.loader.hold({(1, 0): 3})
        assert keeper.slots.versions() == {(1, 0): 3}


def test_what_is_let_go_while_it_is_read_is_not_held() -> None:
    reader = Reader(held_at=(7, 0))
    with Keeper(reader) as keeper:
        keeper.loader.hold(MORE)
        assert reader.reached.wait(PATIENCE_S)
        keeper.loader.hold({**WANTED, (7, 1): 3})
        reader.go.set()
        wait_until(lambda: keeper.loader.missing == 0)
        assert keeper.slots.versions() == {**WANTED, (7, 1): 3}


def test_a_slot_that_cannot_be_read_is_told_and_tried_again_and_the_old_ones_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slot_loader, "FIRST_RETRY_S", 0.001)
    reader = Reader(fails_at=(7, 0))
    with Keeper(reader) as keeper:
        keeper.loader.hold(MORE)
        wait_until(lambda: keeper.loader.failures >= 3)
        assert keeper.loader.problem == "the disk is broken"
        assert (keeper.loader.missing, keeper.slots.versions()) == (1, {**WANTED, (7, 1): 3})
        keeper.loader.hold(WANTED)
        assert (keeper.loader.missing, keeper.loader.problem, keeper.loader.failures) == (0, "", 0)
        keeper.loader.hold(MORE)
        reader.fails_at = None
        wait_until(lambda: keeper.loader.missing == 0 and keeper.loader.problem == "")


def test_reading_keeps_its_pace_but_for_what_a_router_waits_for() -> None:
    """At a byte in ten minutes nothing more would come, but for whoever asks."""
    reader = Reader()
    with Keeper(reader, LoadPace(1 / 600)) as keeper:
        loader = keeper.loader

        def read_one_byte(slot: Slot) -> Expert:
            loader.bytes_read += 1
            return reader(slot)

        loader._read = read_one_byte
        loader.hold({**MORE, (7, 2): 3})
        wait_until(lambda: loader.missing == 2)
        loader.load_now(7, [2])
        assert loader.missing == 1
        assert reader.read[len(WANTED) :] == [(7, 0), (7, 2)]


def test_a_pace_bounds_bytes_and_work_and_saves_nothing_up() -> None:
    now_s = 0.0
    pace = LoadPace(100, lambda: now_s)
    pace.begin()
    assert pace.pause_s(50) == 0.5
    now_s = 10.0
    pace.begin()
    now_s = 10.1
    assert pace.pause_s(50) == pytest.approx(0.4)
    pace.begin()
    now_s = 11.1
    assert pace.pause_s(50) == pytest.approx(1.0 / WORKS - 1.0)

"""A shard's slots change while it computes: a look-up sees all of a change or nothing of it."""

import threading
import weakref
from collections.abc import Sequence

import pytest
import torch

from experts.errors import NotHeld
from experts.placement import Slot
from experts.shard import ExpertShard
from experts.slots import HeldExpert, Slots
from kernels.choose import choose_kernels
from kernels.grouped_mlp import Expert
from tests.processes import PATIENCE_S

LAYER, EXPERTS, HIDDEN = 3, 8, 4
ALL = range(EXPERTS)
KERNELS = choose_kernels(torch.device("cpu"), torch.float32, 1)


def expert_of(version: int) -> Expert:
    """Its down projection grows with its version, and so does what it computes."""
    return KERNELS.expert(torch.ones(2 * HIDDEN, HIDDEN), version * torch.ones(HIDDEN, HIDDEN))


def at_version(version: int, experts: Sequence[int] = ALL) -> dict[Slot, HeldExpert]:
    return {(LAYER, expert): HeldExpert(version, expert_of(version)) for expert in experts}


def slots_with(held: dict[Slot, HeldExpert]) -> Slots:
    slots = Slots()
    slots.change(held)
    return slots


def test_what_is_held_is_found_and_nothing_else() -> None:
    held = at_version(1, [0, 5])
    slots = slots_with(held)
    assert slots.experts(LAYER, [5, 0], [1, 1]) == [held[LAYER, 5].expert, held[LAYER, 0].expert]
    assert slots.versions() == {(LAYER, 0): 1, (LAYER, 5): 1}
    with pytest.raises(NotHeld, match=r"\(3, 1\) is not held here"):
        slots.experts(LAYER, [0, 1], [1, 1])
    with pytest.raises(NotHeld, match=r"\(3, 5\) is held at version 1, not at version 2"):
        slots.experts(LAYER, [0, 5], [1, 2])


def test_experts_are_held_beside_others_replaced_and_let_go_in_one_change() -> None:
    slots = slots_with(at_version(1, [0, 1, 2]))
    slots.change(at_version(2, [1, 3]), let_go=[(LAYER, 0), (LAYER, 1), (LAYER, 7)])
    assert slots.versions() == {(LAYER, 1): 2, (LAYER, 2): 1, (LAYER, 3): 2}


def test_what_a_look_up_returned_lives_as_long_as_it_is_used_and_no_longer() -> None:
    slots = slots_with(at_version(1))
    found = slots.experts(LAYER, [4], [1])
    expert = weakref.ref(found[0])
    slots.change({}, let_go=[(LAYER, each) for each in ALL])
    assert len(slots) == 0
    assert expert() is found[0]
    found.clear()
    assert expert() is None


def test_while_slots_change_a_shard_computes_with_one_version_or_refuses() -> None:
    """Never with experts of two versions, and never with one that is half there."""
    slots = slots_with(at_version(1))
    shard = ExpertShard(slots, KERNELS)
    x_ND = torch.ones(EXPERTS, HIDDEN)
    expected = {version: ExpertShard(slots_with(at_version(version)), KERNELS) for version in (1, 2)}
    answers = {
        version: alone.compute(LAYER, [*ALL], [version] * EXPERTS, [1] * EXPERTS, x_ND)
        for version, alone in expected.items()
    }
    versions = [at_version(1), at_version(2)]
    stop = threading.Event()

    def change() -> None:
        nth = 0
        while not stop.is_set():
            nth += 1
            slots.change(versions[nth % 2])

    changer = threading.Thread(target=change)
    changer.start()
    seen = {1: 0, 2: 0, None: 0}
    try:
        for _ in range(100_000):
            for version in (1, 2):
                try:
                    y_ND = shard.compute(LAYER, [*ALL], [version] * EXPERTS, [1] * EXPERTS, x_ND)
                except NotHeld:
                    seen[None] += 1
                    continue
                assert torch.equal(y_ND, answers[version])
                seen[version] += 1
            if min(seen.values()) >= 20:
                break
    finally:
        stop.set()
        changer.join(PATIENCE_S)
    assert min(seen.values()) >= 20


def test_changes_from_several_threads_lose_nothing() -> None:
    slots, start = Slots(), threading.Barrier(EXPERTS)

    def hold(expert: int) -> None:
        start.wait(PATIENCE_S)
        for layer in range(50):
            slots.change({(layer, expert): HeldExpert(1, expert_of(1))})

    threads = [threading.Thread(target=hold, args=(expert,)) for expert in ALL]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(slots) == 50 * EXPERTS

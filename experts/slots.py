"""The experts that a shard holds now, each with the version of its weights."""

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from experts.errors import NotHeld
from experts.placement import Slot
from kernels.grouped_mlp import Expert


@dataclass(frozen=True)
class HeldExpert:
    """version: of the weights."""

    version: int
    expert: Expert


class Slots:
    """(layer, expert) -> its weights and their version; changed by any thread while others look experts up.

    Each change replaces the mapping as a whole. So a look-up sees all of a change or nothing of
    it, and never waits. What a look-up has returned stays valid: the memory of an expert that was
    let go is freed once the computations that use it have ended.
    """

    def __init__(self) -> None:
        self._held: Mapping[Slot, HeldExpert] = {}
        self._change_lock = threading.Lock()  # between changes; look-ups do not take it

    def change(self, hold: Mapping[Slot, HeldExpert], let_go: Iterable[Slot] = ()) -> None:
        """Let go of some slots and hold others, in one change.

        `hold` wins where a slot is in both.
        """
        with self._change_lock:
            gone = set(let_go)
            kept = {slot: held for slot, held in self._held.items() if slot not in gone}
            self._held = kept | dict(hold)

    def experts(self, layer: int, experts: Sequence[int], versions: Sequence[int]) -> list[Expert]:
        """The weights of a layer's `experts` at just these versions, of one moment.

        Raises NotHeld.
        """
        held_now, found = self._held, []
        for expert, version in zip(experts, versions, strict=True):
            held = held_now.get((layer, expert))
            if held is None:
                raise NotHeld(f"(layer, expert) {layer, expert} is not held here")
            if held.version != version:
                raise NotHeld(
                    f"(layer, expert) {layer, expert} is held at version {held.version}, not at version {version}"
                )
            found.append(held.expert)
        return found

    def holds(self, slot: Slot) -> bool:
        """Whether the slot is held now, at any version."""
        return slot in self._held

    def any_expert(self) -> Expert | None:
        """One of those held now; None if none is."""
        return next((held.expert for held in self._held.values()), None)

    def versions(self) -> dict[Slot, int]:
        """What is held now: the version of each slot's weights."""
        return {slot: held.version for slot, held in self._held.items()}

    def __len__(self) -> int:
        return len(self._held)

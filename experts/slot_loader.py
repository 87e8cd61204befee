"""Fills a shard's slots, one expert after the other, but those first that a router waits for.

So a shard that has just started can answer at once for the few experts that running streams need,
and reads the others meanwhile.
"""

import threading
from collections.abc import Callable, Mapping, Sequence

from experts.errors import NotHeld
from experts.placement import Slot
from experts.slots import HeldExpert, Slots
from kernels.grouped_mlp import Expert


class SlotLoader:
    """Reads what is to be held and is not held yet. One thread calls `load_all`, another one `load_now`."""

    def __init__(self, slots: Slots, wanted: Mapping[Slot, int], read: Callable[[Slot], Expert]) -> None:
        """wanted: the version of each slot that is to be held. read: an expert's weights; may raise anything."""
        self._slots, self.wanted, self._read = slots, wanted, read
        self._reading = threading.Lock()  # one expert at a time: two would share the disk's speed
        self._nobody_waits = threading.Event()
        self._nobody_waits.set()
        self.bytes_read = 0
        """So far; whoever reads adds to it, so that a watch sees that reading gets on."""

    def load_all(self) -> None:
        """Fill every slot. Those that cannot be read do not keep others empty; raises what the first one raised."""
        first_error: Exception | None = None
        for slot in self.wanted:
            self._nobody_waits.wait()
            try:
                self._fill(slot)
            except Exception as error:
                first_error = first_error or error
        if first_error is not None:
            raise first_error

    def load_now(self, layer: int, experts: Sequence[int]) -> None:
        """Fill these experts' slots, as far as they are to be held. Raises NotHeld if one cannot be read."""
        empty = [(layer, expert) for expert in experts if (layer, expert) in self.wanted]
        empty = [slot for slot in empty if not self._slots.holds(slot)]
        if not empty:
            return
        self._nobody_waits.clear()
        try:
            for slot in empty:
                self._fill(slot)
        except Exception as error:
            raise NotHeld(f"(layer, expert) {slot} cannot be read: {error}") from error
        finally:
            self._nobody_waits.set()

    def _fill(self, slot: Slot) -> None:
        with self._reading:
            if not self._slots.holds(slot):
                self._slots.change({slot: HeldExpert(self.wanted[slot], self._read(slot))})

"""Fills a shard's slots, one expert after the other, but those first that a router waits for.

So a shard that has just started can answer at once for the few experts that running streams need,
and reads the others meanwhile. What it is to hold may change while it serves: it reads what is new at
a bounded rate, and lets go of what it is not to hold any more.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence

from experts.errors import NotHeld
from experts.load_pace import LoadPace
from experts.placement import Slot
from experts.slots import HeldExpert, Slots
from kernels.grouped_mlp import Expert

logger = logging.getLogger(__name__)

FIRST_RETRY_S, LAST_RETRY_S = 1.0, 60.0
"""After a failure, the wait before the next try; doubled each time, up to the last."""


class SlotLoader:
    """Reads what is to be held and is not held yet.

    One thread calls `load_all`, and then `keep_filled`. Another one calls `load_now`, and any calls `hold`.
    """

    def __init__(
        self,
        slots: Slots,
        wanted: Mapping[Slot, int],
        read: Callable[[Slot], Expert],
        pace: LoadPace | None = None,
    ) -> None:
        """wanted: the version of each slot that is to be held. read: an expert's weights; may raise anything.

        pace: how fast `keep_filled` reads.
        """
        self._slots, self._read, self._pace = slots, read, pace
        self.wanted = dict(wanted)
        self._changing = threading.Lock()  # of what is wanted, and of what is held as it was wanted
        self._reading = threading.Lock()  # one expert at a time: two would share the disk's speed
        self._nobody_waits = threading.Event()
        self._nobody_waits.set()
        self._is_paced = False
        self._woken, self._closed = threading.Event(), threading.Event()
        self.bytes_read = 0
        """So far; whoever reads adds to it, so that a watch sees that reading gets on."""
        self.problem, self.failures = "", 0
        """Why a slot could not be read last, and how often in a row that was so."""

    @property
    def missing(self) -> int:
        """How many slots are to be held and are not yet."""
        return len(self._empty())

    def hold(self, wanted: Mapping[Slot, int]) -> None:
        """Hold exactly these slots from now on: let go of all others at once, and have the new ones read."""
        with self._changing:
            gone = [slot for slot in self._slots.versions() if slot not in wanted]
            if wanted.keys() - self.wanted.keys():
                self.prepare(wanted)
            if gone:
                self.retire(gone)
            self.wanted = dict(wanted)
            self.problem, self.failures = "", 0
        self._woken.set()

    def prepare(self, wanted: Mapping[Slot, int]) -> None:
        """More than before is to be held."""
        logger.info("%d more slots are to be held", len(wanted.keys() - self.wanted.keys()))

    def retire(self, gone: Sequence[Slot]) -> None:
        """Let go of these slots. Computations that use them end as always."""
        logger.info("%d slots are let go", len(gone))
        self._slots.change({}, gone)

    def load_all(self) -> None:
        """Fill every slot. Those that cannot be read do not keep others empty; raises what the first one raised."""
        while empty := self._empty():
            first_error: Exception | None = None
            for slot in empty:
                self._nobody_waits.wait()
                try:
                    self._fill_at_pace(slot)
                except Exception as error:
                    first_error = first_error or error
            if first_error is not None:
                self.problem, self.failures = str(first_error), self.failures + 1
                raise first_error
        self.problem, self.failures = "", 0

    def keep_filled(self) -> None:
        """Fill what is empty whenever something else is to be held, at the pace, until `close`."""
        self._is_paced, retry_s = True, FIRST_RETRY_S
        while not self._closed.is_set():
            self._woken.wait(retry_s if self.problem else None)
            self._woken.clear()
            try:
                self.load_all()
            except Exception as error:
                logger.warning("a slot cannot be read: %s", error)
                retry_s = min(2 * retry_s, LAST_RETRY_S) if self.failures > 1 else FIRST_RETRY_S
            else:
                retry_s = FIRST_RETRY_S

    def close(self) -> None:
        """Let `keep_filled` end."""
        self._closed.set()
        self._woken.set()

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

    def _empty(self) -> list[Slot]:
        return [slot for slot in self.wanted if not self._slots.holds(slot)]

    def _fill_at_pace(self, slot: Slot) -> None:
        if self._pace is None or not self._is_paced:
            self._fill(slot)
            return
        self._pace.begin()
        before = self.bytes_read
        self._fill(slot)
        self._closed.wait(self._pace.pause_s(self.bytes_read - before))

    def _fill(self, slot: Slot) -> None:
        with self._reading:
            version = self.wanted.get(slot)
            if version is None or self._slots.holds(slot):
                return
            expert = self._read(slot)
            with self._changing:
                if self.wanted.get(slot) == version:  # else it was let go meanwhile
                    self._slots.change({slot: HeldExpert(version, expert)})

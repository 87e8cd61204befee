"""Wakes the one thread that waits for any of several things.

A step may wait for a reply over any link, for a shard to come back, or for a cancellation. Whoever
brings one of them rings the router's one bell.
"""

import threading
from typing import Protocol


class Bell(Protocol):
    """What a waiting step needs; tests have one whose time is not real."""

    @property
    def rings(self) -> int:
        """How often it was rung."""
        ...

    def ring(self) -> None:
        """Make whoever waits look again. Call it after the change that it should see."""
        ...

    def wait(self, seen: int, timeout_s: float) -> None:
        """Return once `rings` is no longer `seen`, or after timeout_s.

        Read `rings` first, then look whether a wait is needed, then wait: no change can be missed.
        """
        ...


class ThreadBell:
    """A bell between threads of one process."""

    def __init__(self) -> None:
        self._rung = threading.Condition()
        self.rings = 0

    def ring(self) -> None:
        with self._rung:
            self.rings += 1
            self._rung.notify_all()

    def wait(self, seen: int, timeout_s: float) -> None:
        with self._rung:
            self._rung.wait_for(lambda: self.rings != seen, timeout_s)

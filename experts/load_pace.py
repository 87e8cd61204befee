"""How fast weights are read beside streams: reading takes memory bandwidth, cores and the interpreter, as they do."""

import time
from collections.abc import Callable

WORKS = 0.2
"""The share of the time in which reading may go on. Small experts cost more processor time than bandwidth."""


class LoadPace:
    """Lets so many bytes through each second, and works a fifth of the time at most; saves nothing up while idle."""

    def __init__(self, bytes_per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._bytes_per_s, self._clock = bytes_per_s, clock
        self._began_s: float | None = None

    def begin(self) -> None:
        """An expert is about to be read."""
        self._began_s = self._clock()

    def pause_s(self, size: int) -> float:
        """How long to wait after it was read. size: its bytes."""
        assert self._began_s is not None
        took_s = self._clock() - self._began_s
        return max(size / self._bytes_per_s, took_s / WORKS) - took_s

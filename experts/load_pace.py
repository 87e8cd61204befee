"""How fast weights are read beside streams: reading takes memory bandwidth, which they need, too."""

import time
from collections.abc import Callable


class LoadPace:
    """A bucket that lets so many bytes through each second, and saves nothing up while nobody reads."""

    def __init__(self, bytes_per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._bytes_per_s, self._clock = bytes_per_s, clock
        self._free_s = clock()

    def pause_s(self, size: int) -> float:
        """How long to wait after so many bytes were read."""
        now_s = self._clock()
        self._free_s = max(self._free_s, now_s) + size / self._bytes_per_s
        return self._free_s - now_s

"""How often requests end. A refused client is told to retry after that time."""


class EndRate:
    """Seconds between the ends of requests, exponentially smoothed (weight 0.1).

    The caller passes the time.
    """

    def __init__(self, now_s: float) -> None:
        self._last_s = now_s
        self._per_end_s = 1.0

    def begin(self, now_s: float) -> None:
        """The first request after an idle time arrived. The idle time is not counted."""
        self._last_s = now_s

    def count(self, now_s: float) -> None:
        """A request ended."""
        self._per_end_s += 0.1 * (now_s - self._last_s - self._per_end_s)
        self._last_s = now_s

    def seconds_per_end(self, now_s: float) -> float:
        """Estimated seconds until the next request ends; at least the time since the last one did."""
        return max(self._per_end_s, now_s - self._last_s, 0.001)

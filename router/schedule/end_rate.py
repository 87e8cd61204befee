"""How often requests end, for telling those that are refused when to come again."""


class EndRate:
    """An average over the last requests; the clock is the caller's, in seconds."""

    def __init__(self, now_s: float) -> None:
        self._last_s = now_s
        self._per_end_s = 1.0

    def begin(self, now_s: float) -> None:
        """There is a request again: the time without any tells nothing."""
        self._last_s = now_s

    def count(self, now_s: float) -> None:
        self._per_end_s += 0.1 * (now_s - self._last_s - self._per_end_s)
        self._last_s = now_s

    def seconds_per_end(self, now_s: float) -> float:
        """Seconds until the next request ends, as far as the last ones tell."""
        return max(self._per_end_s, now_s - self._last_s, 0.001)

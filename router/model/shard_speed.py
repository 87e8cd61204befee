"""How fast each shard answers: when a reply is late, and which shards are slow.

Deadlines follow RFC 6298, as TCP's do: a smoothed mean, and four times the smoothed deviation.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass

_MEAN_SHARE, _DEVIATION_SHARE = 1 / 8, 1 / 4  # RFC 6298's alpha and beta
FIRST_DEADLINE_S = 1.0
"""While nothing is known of a shard. RFC 6298's, too."""
LEAST_DEADLINE_S = 0.05
"""A busy machine may keep a thread waiting so long."""
MESSAGE_WORK = 4.0
"""What a message takes beside the work in it: as long as reading so many small experts."""
SLOW = 4.0
"""A shard counts as slow that takes so many times as long as the fastest. Below, it is noise."""
LATE_IN_A_ROW = 2
"""A shard that was late so often, without an answer in time in between, counts as slow. Once may be a hiccup."""
LATE = 1000.0
"""How slow such a shard is taken to be: it gets nothing that another holds."""
FIRST_TRY_S, LAST_TRY_S = 1.0, 30.0
"""A slow shard is tried with one message after so long, and each time it is late again after twice as long."""


@dataclass
class _Speed:
    """Seconds per unit of work: mean and deviation. late: times in a row. try_s: when to try a slow shard."""

    mean_s: float
    deviation_s: float
    late: int = 0
    pause_s: float = FIRST_TRY_S
    try_s: float = 0.0


class ShardSpeeds:
    """Fed with every answer of the shards; times are by one clock, work is that of `work_of`."""

    def __init__(self) -> None:
        self._speeds: dict[int, _Speed] = {}

    def answered(self, shard: int, work: float, seconds: float, now_s: float) -> None:
        """The shard took `seconds` for `work`, and was not late."""
        unit_s = max(seconds, 1e-6) / (MESSAGE_WORK + work)
        speed = self._speeds.get(shard)
        if speed is None or speed.late:  # what was known is not so any more
            self._speeds[shard] = _Speed(unit_s, unit_s / 2, try_s=now_s + FIRST_TRY_S)
            return
        speed.deviation_s += _DEVIATION_SHARE * (abs(unit_s - speed.mean_s) - speed.deviation_s)
        speed.mean_s += _MEAN_SHARE * (unit_s - speed.mean_s)
        speed.try_s = now_s + FIRST_TRY_S

    def is_late(self, shard: int, now_s: float) -> None:
        """The shard has not answered by its deadline."""
        speed = self._speeds.setdefault(shard, _Speed(0.0, 0.0))
        speed.late += 1
        if speed.late >= LATE_IN_A_ROW:
            speed.try_s = now_s + speed.pause_s
            speed.pause_s = min(2 * speed.pause_s, LAST_TRY_S)

    def forget(self, shard: int) -> None:
        """Another process has the shard's place."""
        self._speeds.pop(shard, None)

    def keep_only(self, shards: Container[int]) -> None:
        """Forget all other shards: they have no link, or are gone for good."""
        for shard in [shard for shard in self._speeds if shard not in shards]:
            self.forget(shard)

    def deadline_s(self, shard: int, work: float) -> float:
        """How long an answer may take before another shard is asked, too."""
        speed = self._speeds.get(shard)
        if speed is None or speed.mean_s == 0.0:
            return FIRST_DEADLINE_S
        return max(LEAST_DEADLINE_S, (MESSAGE_WORK + work) * (speed.mean_s + 4 * speed.deviation_s))

    def slowness(self) -> Mapping[int, float]:
        """The slow shards: how many times as long as the fastest each takes."""
        speeds = list(self._speeds.items())  # at once: other threads ask, too
        means_s = [speed.mean_s for _, speed in speeds if speed.mean_s]
        if not means_s:
            return {}
        fastest_s = min(means_s)
        times = {shard: LATE if speed.late >= LATE_IN_A_ROW else speed.mean_s / fastest_s for shard, speed in speeds}
        return {shard: ratio for shard, ratio in times.items() if ratio >= SLOW}

    def slowness_now(self, now_s: float) -> Mapping[int, float]:
        """The same for a step's choice: a slow shard whose time has come is left out once, and so tried."""
        slow = dict(self.slowness())
        for shard in tuple(slow):
            speed = self._speeds[shard]
            if speed.try_s <= now_s:
                speed.try_s = now_s + speed.pause_s
                del slow[shard]
        return slow

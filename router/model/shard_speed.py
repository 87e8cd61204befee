"""How fast each shard answers: when a reply is late, and which shards are slow.

Deadlines follow RFC 6298, as TCP's do: a smoothed mean, and four times the smoothed deviation.
"""

from collections.abc import Mapping
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
HALF_LIFE_S = 5.0
"""A slow shard gets no rows, so nothing new is heard of it. Its slowness is halved in this time; then it is tried."""


@dataclass
class _Speed:
    """Seconds per unit of work: mean and deviation, and when they were last measured."""

    mean_s: float
    deviation_s: float
    measured_s: float


class ShardSpeeds:
    """Fed with every answer of the shards; times are by one clock, work is that of `work_of`."""

    def __init__(self) -> None:
        self._speeds: dict[int, _Speed] = {}

    def answered(self, shard: int, work: float, seconds: float, now_s: float) -> None:
        """The shard took `seconds` for `work`."""
        unit_s = _unit_s(work, seconds)
        speed = self._speeds.get(shard)
        if speed is None or now_s - speed.measured_s > HALF_LIFE_S:  # what was known is old
            self._speeds[shard] = _Speed(unit_s, unit_s / 2, now_s)
            return
        speed.deviation_s += _DEVIATION_SHARE * (abs(unit_s - speed.mean_s) - speed.deviation_s)
        speed.mean_s += _MEAN_SHARE * (unit_s - speed.mean_s)
        speed.measured_s = now_s

    def is_late(self, shard: int, work: float, seconds: float, now_s: float) -> None:
        """The shard has not answered for `seconds`: at least so slow it is."""
        speed, unit_s = self._speeds.get(shard), _unit_s(work, seconds)
        if speed is None:
            self._speeds[shard] = _Speed(unit_s, unit_s / 2, now_s)
        elif unit_s > speed.mean_s:
            speed.mean_s, speed.measured_s = unit_s, now_s

    def forget(self, shard: int) -> None:
        """Another process has the shard's place."""
        self._speeds.pop(shard, None)

    def deadline_s(self, shard: int, work: float) -> float:
        """How long an answer may take before another shard is asked, too."""
        speed = self._speeds.get(shard)
        if speed is None:
            return FIRST_DEADLINE_S
        return max(LEAST_DEADLINE_S, (MESSAGE_WORK + work) * (speed.mean_s + 4 * speed.deviation_s))

    def slowness(self, now_s: float) -> Mapping[int, float]:
        """The slow shards: how many times as long as the fastest each takes. See SLOW and HALF_LIFE_S."""
        if len(self._speeds) < 2:
            return {}
        fastest_s = min(speed.mean_s for speed in self._speeds.values())
        times = {
            shard: speed.mean_s / fastest_s * 0.5 ** ((now_s - speed.measured_s) / HALF_LIFE_S)
            for shard, speed in self._speeds.items()
        }
        return {shard: ratio for shard, ratio in times.items() if ratio >= SLOW}


def _unit_s(work: float, seconds: float) -> float:
    return max(seconds, 1e-6) / (MESSAGE_WORK + work)

"""A cable between two network devices that delays or loses packets. Needs root and Linux.

python -m bench.chaos.bad_cable LEFT RIGHT DELAY_MS JITTER_MS LOSS

Not every kernel has netem. This forwards each frame that one device receives to the other, keeping
the order, DELAY_MS plus up to JITTER_MS later, and drops the share LOSS of them. It prints "up" when
it forwards. When stdin ends, so does it, and prints how many frames it delayed and lost.
"""

import heapq
import itertools
import random
import select
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_ETH_P_ALL = 0x0003
_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_OUTGOING = 263, 15, 4
_LONGEST = 1 << 17
"""Bytes of a frame: the kernel hands over what it would have cut into packets only at a real device."""


@dataclass
class Cable:
    """Frames under way. Pure: the clock is given."""

    delay_s: float
    jitter_s: float
    loss: float
    draw: random.Random
    delayed: int = 0
    lost: int = 0
    _waiting: list[tuple[float, int, int, bytes]] = field(default_factory=list)
    _order: Iterator[int] = field(default_factory=itertools.count)
    _last_s: dict[int, float] = field(default_factory=dict)

    def take(self, frame: bytes, out: int, now_s: float) -> None:
        """A frame that is to leave by side `out`; or not."""
        if self.draw.random() < self.loss:
            self.lost += 1
            return
        due_s = max(now_s + self.delay_s + self.draw.uniform(0, self.jitter_s), self._last_s.get(out, 0.0))
        self._last_s[out] = due_s
        self.delayed += due_s > now_s
        heapq.heappush(self._waiting, (due_s, next(self._order), out, frame))

    def due(self, now_s: float) -> list[tuple[int, bytes]]:
        """(side, frame) of all that leave by now, oldest first."""
        leaving = []
        while self._waiting and self._waiting[0][0] <= now_s:
            _, _, out, frame = heapq.heappop(self._waiting)
            leaving.append((out, frame))
        return leaving

    def wait_s(self, now_s: float) -> float | None:
        """How long until the next frame leaves; None if there is none."""
        return max(0.0, self._waiting[0][0] - now_s) if self._waiting else None


def _open(device: str) -> socket.socket:
    """A socket for whole frames. Its header tells the kernel which checksums and cuts are still to be made."""
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    opened.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    opened.bind((device, 0))
    opened.setblocking(False)
    return opened


def forward(cable: Cable, sides: list[socket.socket], until: int) -> None:
    """Forward both ways until the descriptor `until` can be read."""
    watched: list[Any] = [*sides, until]
    while True:
        readable, _, _ = select.select(watched, [], [], cable.wait_s(time.monotonic()))
        if until in readable:
            return
        for index, side in enumerate(sides):
            if side in readable:
                frame, (_, _, kind, *_) = side.recvfrom(_LONGEST)
                if kind != _PACKET_OUTGOING:  # what this sends comes back to it, too
                    cable.take(frame, 1 - index, time.monotonic())
        for out, frame in cable.due(time.monotonic()):
            try:
                sides[out].send(frame)
            except OSError:
                cable.lost += 1  # the device is down, or its queue is full


def main() -> None:
    left, right, delay_ms, jitter_ms, loss = sys.argv[1:]
    cable = Cable(float(delay_ms) / 1e3, float(jitter_ms) / 1e3, float(loss), random.Random(f"{left} {right}"))
    sides = [_open(left), _open(right)]
    print("up", flush=True)
    forward(cable, sides, sys.stdin.fileno())
    print(cable.delayed, cable.lost, flush=True)


if __name__ == "__main__":
    main()

"""Real shards behind links that fail on purpose, in a time that is not real.

Whoever waits on the bell makes the time pass, so tests of seconds take milliseconds.
"""

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from experts.errors import ComputeFailed, LinkDown, NotHeld, ShardRefused
from experts.link import ExpertRows, Reply
from experts.link_table import LinkTable
from experts.shard import ExpertShard

LATENCY_S = 0.001
DEAD_AFTER_S = 0.5


@dataclass
class FakeTime:
    """A clock, and a bell whose waits make it go on."""

    now_s: float = 1000.0
    rings: int = 0
    oversleeps_s: float = 0.0
    """Added to the next wait: the whole process was stopped."""
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _order: "itertools.count[int]" = field(default_factory=itertools.count)

    def __call__(self) -> float:
        return self.now_s

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now_s + seconds, next(self._order), event))

    def ring(self) -> None:
        self.rings += 1

    def wait(self, seen: int, timeout_s: float) -> None:
        end_s = self.now_s + max(timeout_s, 1e-6) + self.oversleeps_s
        if self.oversleeps_s:
            self.now_s, self.oversleeps_s = end_s, 0.0
            return
        while self.rings == seen and self._events and self._events[0][0] <= end_s:
            at_s, _, event = heapq.heappop(self._events)
            self.now_s = max(self.now_s, at_s)
            event()
        if self.rings == seen:
            self.now_s = end_s

    def pass_by(self, seconds: float) -> None:
        """Let so much time pass."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.wait(self.rings, end_s - self.now_s)


class FaultyReply:
    """The answer is computed at once and told when its time has come."""

    def __init__(self, shard: "FaultyShard", generation: int, outcome: torch.Tensor | ShardRefused) -> None:
        self._shard, self._generation, self._outcome = shard, generation, outcome
        self.answered_s: float | None = None

    def arrive(self) -> None:
        shard = self._shard
        if not self.lost:
            self.answered_s = shard.time.now_s
            shard.time.ring()

    @property
    def lost(self) -> bool:
        return self._generation != self._shard.generation

    @property
    def done(self) -> bool:
        return self.answered_s is not None or self.lost

    def take(self) -> torch.Tensor:
        if self.answered_s is None:
            raise LinkDown("lost: the peer closed it")
        if isinstance(self._outcome, ShardRefused):
            raise self._outcome
        return self._outcome


@dataclass(frozen=True)
class FaultyLink:
    """The link of one generation of the shard: once the shard is linked anew, this one stays down."""

    shard: "FaultyShard"
    generation: int

    @property
    def down_reason(self) -> str | None:
        return None if self.generation == self.shard.generation else "lost: the peer closed it"

    @property
    def is_loaded(self) -> bool:
        return not self.shard.is_loading

    def request(self, rows: ExpertRows) -> Reply:
        return self.shard.request(self.generation, rows)

    def close(self) -> None:
        pass


class FaultyShard:
    """One shard of a router, with faults that strike now or at one of the next requests."""

    def __init__(self, number: int, shard: ExpertShard, table: LinkTable, time: FakeTime) -> None:
        self.number, self.time = number, time
        self._shard, self._table = shard, table
        self.generation = 0
        self.is_frozen = self.is_loading = False
        self.slowness = 1.0
        self.requests = 0
        self._armed: dict[int, Callable[[], None]] = {}
        self._refusal: ShardRefused | None = None
        self.cannot_read: int | None = None
        """An expert that it refuses, and with it every message that asks for it."""
        self._held: list[FaultyReply] = []
        self.link()

    def link(self, *, loading_s: float = 0.0) -> None:
        """Link the shard anew; it then loads for a while."""
        self.is_frozen, self.is_loading = False, loading_s > 0
        if self.is_loading:
            self.time.after(loading_s, self._loaded)
        self._table.replace(self.number, FaultyLink(self, self.generation))

    def _loaded(self) -> None:
        self.is_loading = False
        self._table.look_again()

    def arm(self, requests: int, fault: Callable[[], None]) -> None:
        """Have `fault` strike when so many more requests have come, just before the last is taken."""
        self._armed[self.requests + requests] = fault

    def kill(self, back_after_s: float | None, loading_s: float = 0.0) -> None:
        """Whatever it was asked is lost. back_after_s: until it is linked again; None: never."""
        if self._table.down_reason(self.number) is not None:
            return
        self.generation += 1
        self._table.remove(self.number, "lost: the peer closed it", "lost")
        if back_after_s is not None:
            self.time.after(back_after_s, lambda: self.link(loading_s=loading_s))

    def freeze(self, seconds: float) -> None:
        """Nothing comes from it. If that is too long, its link is given up, and formed anew when it thaws."""
        if self.is_frozen or self._table.down_reason(self.number) is not None:
            return
        self.is_frozen, generation = True, self.generation
        if seconds > DEAD_AFTER_S:
            self.time.after(DEAD_AFTER_S, lambda: self._give_up(generation, seconds - DEAD_AFTER_S))
        else:
            self.time.after(seconds, self._thaw)

    def _give_up(self, generation: int, back_after_s: float) -> None:
        if generation == self.generation:
            self.kill(back_after_s)

    def _thaw(self) -> None:
        self.is_frozen = False
        held, self._held = self._held, []
        for reply in held:
            reply.arrive()

    def _arrives(self, reply: FaultyReply) -> None:
        if self.is_frozen:
            self._held.append(reply)
        else:
            reply.arrive()

    def refuse(self, error: type[ShardRefused]) -> None:
        """Refuse the request that comes next."""
        self._refusal = error("as the test wants it")

    def request(self, generation: int, rows: ExpertRows) -> FaultyReply:
        self.requests += 1
        fault = self._armed.pop(self.requests, None)
        if fault is not None:
            fault()
        if generation != self.generation:
            raise LinkDown("sending failed: Broken pipe")
        outcome: torch.Tensor | ShardRefused
        if self._refusal is not None:
            outcome, self._refusal = self._refusal, None
        elif self.cannot_read in rows.experts:
            outcome = NotHeld(f"{self.cannot_read} cannot be read")
        else:
            try:
                outcome = self._shard.compute(*rows)
            except (NotHeld, ComputeFailed) as refused:
                outcome = refused
        reply = FaultyReply(self, generation, outcome)
        if self.is_frozen:
            self._held.append(reply)
        else:
            self.time.after(LATENCY_S * self.slowness, lambda: self._arrives(reply))
        return reply

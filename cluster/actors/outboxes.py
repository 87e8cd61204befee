"""What a router has made and its frontends have not pulled yet, and whose each request is."""

import asyncio
import itertools
import secrets
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cluster.reports import Batch
from router.request import TokenDelta

LONG_POLL_S = 1.0


@dataclass
class _Outbox:
    """Deltas that one frontend has not pulled yet, and the last batch, kept until its receipt has come.

    pulls: how many there were. Only the newest may take deltas: the caller of an older one has
    given up.
    heard_s: when the frontend last called.
    """

    deltas: list[TokenDelta]
    filled: asyncio.Event
    heard_s: float
    last: Batch
    pulls: int = 0


class Outboxes:
    """One for each frontend, made by its first call. Lives on one event loop.

    owner_of: the frontend of each request whose last delta has not reached its outbox. None: the
    request was cancelled, but the engine may still have deltas of it.
    """

    def __init__(self) -> None:
        self.owner_of: dict[str, str | None] = {}
        self._outboxes: dict[str, _Outbox] = {}
        self._batch_numbers = itertools.count(secrets.randbits(62))

    def __len__(self) -> int:
        return len(self._outboxes)

    @property
    def open_requests(self) -> int:
        """Requests whose end no frontend has pulled."""
        return len(self.owner_of) + sum(delta.is_last for outbox in self._outboxes.values() for delta in outbox.deltas)

    def hear(self, frontend_id: str) -> None:
        """The frontend has called."""
        self._of(frontend_id).heard_s = time.monotonic()

    def put(self, deltas: Sequence[TokenDelta]) -> None:
        """Give each delta to its request's owner. A request's last one makes its id free."""
        for delta in deltas:
            frontend_id = self.owner_of.get(delta.request_id)
            if frontend_id is None:
                continue  # cancelled meanwhile
            if delta.is_last:
                del self.owner_of[delta.request_id]
            self.tell(frontend_id, delta)

    def tell(self, frontend_id: str, delta: TokenDelta) -> None:
        """Give a delta to a frontend, if it has not gone."""
        outbox = self._outboxes.get(frontend_id)
        if outbox is not None:
            outbox.deltas.append(delta)
            outbox.filled.set()

    def drop(self, frontend_id: str, request_ids: Collection[str]) -> None:
        """Forget what was made for the frontend of these requests: nobody reads it."""
        outbox = self._outboxes.get(frontend_id)
        if outbox is not None:
            outbox.deltas = [delta for delta in outbox.deltas if delta.request_id not in request_ids]

    async def pull(self, frontend_id: str, receipt: int) -> Batch:
        """Everything made for this frontend since the batch that `receipt` names; waits up to LONG_POLL_S for it.

        If `receipt` is not the last batch's number, that batch was lost on the way, or this is a
        new outbox: the last batch comes (again), at once. If nothing was made, it comes too, and
        its number says that it is known.
        """
        self.hear(frontend_id)
        outbox = self._of(frontend_id)
        outbox.pulls += 1
        this_pull = outbox.pulls
        if receipt != outbox.last.number:
            return outbox.last
        try:
            await asyncio.wait_for(outbox.filled.wait(), LONG_POLL_S)
        except asyncio.TimeoutError:
            return outbox.last
        if this_pull != outbox.pulls:
            return outbox.last
        outbox.filled.clear()
        outbox.last = Batch(next(self._batch_numbers), outbox.deltas)
        outbox.deltas = []
        return outbox.last

    def silent_since(self, time_s: float) -> dict[str, list[str]]:
        """The requests of each frontend that was not heard after `time_s`, a time of the monotonic clock."""
        silent = [frontend_id for frontend_id, outbox in self._outboxes.items() if outbox.heard_s < time_s]
        return {
            frontend_id: [request for request, owner in self.owner_of.items() if owner == frontend_id]
            for frontend_id in silent
        }

    def remove(self, frontend_id: str) -> None:
        """The frontend has gone. Should it call again, it gets a new outbox."""
        self._outboxes.pop(frontend_id, None)

    def _of(self, frontend_id: str) -> _Outbox:
        outbox = self._outboxes.get(frontend_id)
        if outbox is None:
            last = Batch(next(self._batch_numbers), [])
            outbox = self._outboxes[frontend_id] = _Outbox([], asyncio.Event(), time.monotonic(), last)
        return outbox

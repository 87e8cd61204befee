"""What a frontend needs of a router.

Implemented over Ray by `cluster/router_client.py`, and within one process by `frontend/in_process/router.py`.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from router.counts.requests import CANCELLED
from router.errors import AlreadyExists, RequestError
from router.request import GenerationRequest, RequestLimits, TokenDelta


@dataclass(frozen=True)
class Readiness:
    """Whether the model can answer now, and if not, which part is missing."""

    ready: bool
    detail: str = ""


class RouterClient(Protocol):
    """One router, or several that look like one."""

    async def limits(self) -> RequestLimits: ...

    async def readiness(self) -> Readiness:
        """Whether every part that a request needs is up. Never raises."""
        ...

    def generate(
        self, request: GenerationRequest, ending: Callable[[], str] = lambda: CANCELLED
    ) -> AsyncGenerator[TokenDelta, None]:
        """The request's deltas, as they are made; ends after the one with a finish_reason.

        Closing or cancelling the generator frees the request's work within one step. ending: then asked, once, how the
        request is to be counted, one of router/counts/requests.py's ENDINGS.
        Raises ResourceExhausted, Unavailable (see router/errors.py).
        """
        ...


class DeltaStreams:
    """Sorts a router's mixed deltas into one stream per request. Lives on one event loop."""

    def __init__(self) -> None:
        self._queues: dict[str, asyncio.Queue[TokenDelta]] = {}

    def open(self, request_id: str) -> None:
        """Keep deltas for `request_id` from now on; call before submitting it. Raises AlreadyExists."""
        if request_id in self._queues:
            raise AlreadyExists(f"request {request_id} is under way already; it goes on")
        self._queues[request_id] = asyncio.Queue()

    def close(self, request_id: str) -> None:
        self._queues.pop(request_id, None)

    def deliver(self, deltas: Iterable[TokenDelta]) -> None:
        """Hand each delta to its stream; those of streams closed meanwhile are dropped."""
        for delta in deltas:
            queue = self._queues.get(delta.request_id)
            if queue is not None:
                queue.put_nowait(delta)

    def fail_all(self, error: RequestError) -> None:
        """End every open stream with `error`."""
        self.deliver([TokenDelta(request_id, error=error) for request_id in self._queues])

    async def read(self, request_id: str) -> AsyncGenerator[TokenDelta, None]:
        """The deltas of an open stream up to its last; raises that one's error."""
        queue = self._queues[request_id]
        while True:
            delta = await queue.get()
            if delta.error is not None:
                raise delta.error
            yield delta
            if delta.is_last:
                return

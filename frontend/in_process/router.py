"""A router in the same process, with its engine in a thread."""

import asyncio
from collections.abc import Sequence

from frontend.delta_stream import DeltaStream, DeltaStreams
from frontend.router_client import Readiness
from router.counts.requests import EngineSnapshot
from router.engine import Engine
from router.engine_thread import EngineThread
from router.request import GenerationRequest, RequestLimits, TokenDelta


class InProcessRouter:
    """A RouterClient whose engine runs in a thread of this process."""

    def __init__(self, engine: Engine) -> None:
        """Must be called on the event loop that will use it."""
        self._limits = engine.request_limits
        self._loop = asyncio.get_running_loop()
        self._engine = EngineThread(engine, self._deliver)
        self._streams = DeltaStreams(self._engine)

    async def limits(self) -> RequestLimits:
        return self._limits

    async def readiness(self) -> Readiness:
        return Readiness(ready=True)

    @property
    def snapshot(self) -> EngineSnapshot:
        """Everything that the engine counts; from the event loop's thread."""
        return self._engine.snapshot

    def generate(self, requests: Sequence[GenerationRequest]) -> DeltaStream:
        return self._streams.new_stream(requests)

    def release(self, call_id: str, keep: str) -> None:
        self._streams.release(call_id, keep)

    def stop(self, timeout_s: float = 10.0) -> None:
        """Stop the engine after the step at hand."""
        self._engine.stop(timeout_s)

    def _deliver(self, deltas: Sequence[TokenDelta]) -> None:
        self._loop.call_soon_threadsafe(self._streams.deliver, deltas)

"""A router's actor in this process, without Ray and shards, and a frontend that pulls by hand."""

import asyncio
import threading
from collections.abc import Sequence

from cluster.actors.router import RouterActor, RouterSpec
from cluster.reports import Phase
from router.engine_thread import EngineThread
from router.model.llama4 import Model
from router.request import TokenDelta
from tests.processes import PATIENCE_S
from tests.router.engines import make_engine


class LocalRouter(RouterActor):
    """A RouterActor that holds all experts itself. `last_posted`: the engine has posted a last delta to the loop."""

    def __init__(self, spec: RouterSpec, model: Model) -> None:
        self.model = model
        self.last_posted = threading.Event()
        super().__init__(spec)

    def _load(self) -> None:
        self._engine = EngineThread(make_engine(self.model), self._deliver)

    def _deliver(self, deltas: Sequence[TokenDelta]) -> None:
        super()._deliver(deltas)
        if any(delta.is_last for delta in deltas):
            self.last_posted.set()

    async def wait_until_ready(self) -> None:
        while (await self.state()).phase is not Phase.READY:
            await asyncio.sleep(0.01)

    async def wait_until_free(self, request_id: str) -> None:
        while request_id in self._frontend_of:
            await asyncio.sleep(0.01)

    def close(self) -> None:
        assert self._engine is not None
        assert self._engine.stop(PATIENCE_S)


class Reader:
    """Pulls a frontend's deltas by hand."""

    def __init__(self, router: LocalRouter, frontend_id: str) -> None:
        self._router, self._frontend_id = router, frontend_id
        self.receipts = [-1]

    async def read_to_end(self) -> list[TokenDelta]:
        """The deltas up to a batch that ends a request."""
        deltas: list[TokenDelta] = []
        while not (deltas and deltas[-1].is_last):
            deltas += await self.read()
        return deltas

    async def read_to_end_of(self, request_id: str) -> list[TokenDelta]:
        deltas: list[TokenDelta] = []
        while not any(delta.request_id == request_id and delta.is_last for delta in deltas):
            deltas += await self.read()
        return deltas

    async def read(self) -> list[TokenDelta]:
        """What the next pull brings, if it is new."""
        batch = await self._router.pull(self._frontend_id, self.receipts[-1])
        if batch.number == self.receipts[-1]:
            return []
        self.receipts.append(batch.number)
        return batch.deltas

"""Routers and frontends in one process, without Ray: what lies between them is real, but for Ray's calls."""

import asyncio
import itertools
import threading
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import ray

from cluster.actors.router import RouterActor, RouterSpec
from cluster.reports import Phase
from cluster.router_client import RayRouterConnection
from frontend.router_connection import Pulse
from frontend.router_pool import RouterPool
from router.engine_thread import EngineThread
from router.model.llama4 import Model
from router.request import TokenDelta, request_limits
from tests.processes import PATIENCE_S
from tests.router.engines import make_engine

_frontends = itertools.count()


class LocalRouter(RouterActor):
    """A RouterActor that holds all experts itself. `last_posted`: the engine has posted a last delta to the loop.

    Its process can seem to be killed, or frozen: then no call is answered, and its heart stands still.
    """

    def __init__(self, spec: RouterSpec, model: Model) -> None:
        self.model = model
        self.last_posted = threading.Event()
        self.is_dead = False
        self._runs, self._heart_runs = asyncio.Event(), threading.Event()
        self.thaw()
        super().__init__(spec)

    def _ask_and_load(self) -> None:
        self._progress.run(self._load)

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
        while request_id in self._outboxes.owner_of:
            await asyncio.sleep(0.01)

    def freeze(self) -> None:
        self._runs.clear()
        self._heart_runs.clear()

    def thaw(self) -> None:
        self._runs.set()
        self._heart_runs.set()

    def kill(self) -> None:
        self.is_dead = True
        for line in tuple(self._heart._lines):
            line.close()

    async def answer(self, name: str, *args: Any) -> Any:
        """What a call gets from Ray."""
        await self._runs.wait()
        if self.is_dead:
            raise ray.exceptions.ActorUnavailableError("it was killed", None)
        return await getattr(self, name)(*args)

    def _pulse(self) -> Pulse:
        self._heart_runs.wait(PATIENCE_S)
        return super()._pulse()

    def close(self) -> None:
        self.thaw()
        assert self._engine is not None
        assert self._engine.stop(PATIENCE_S)


class Remotely:
    """A method as Ray offers it: the call runs by itself, and its answer is awaited."""

    def __init__(self, method: Callable[..., Coroutine[Any, Any, Any]]) -> None:
        self._method = method

    def remote(self, *args: Any) -> "asyncio.Task[Any]":
        return asyncio.create_task(self._method(*args))


class Directly(RayRouterConnection):
    """A connection to a router in this process. `router` may be replaced by another, as a restart does."""

    def __init__(self, router: LocalRouter, frontend_id: str, name: str, silence_s: float) -> None:
        super().__init__(name, "namespace", frontend_id, silence_s)
        self.router = router

    def _look_up(self) -> Any:
        names = ("expect_frontend", "readiness", "submit", "cancel", "release", "pull")
        return SimpleNamespace(**{name: Remotely(partial(self._call, name)) for name in names})

    async def _call(self, name: str, *args: Any) -> Any:
        return await self.router.answer(name, *args)


def connections_to(*routers: LocalRouter, silence_s: float = PATIENCE_S) -> list[Directly]:
    """One to each router, of a frontend of its own."""
    frontend_id = f"frontend-{next(_frontends)}"
    return [Directly(router, frontend_id, f"router-{number}", silence_s) for number, router in enumerate(routers)]


def client_of(router: LocalRouter) -> RouterPool:
    """A frontend of its own."""
    return RouterPool(connections_to(router), request_limits(router.model.config), heal_s=PATIENCE_S)


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

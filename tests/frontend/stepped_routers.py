"""Routers whose engines a test steps by hand, behind a pool: faults land exactly where the test says."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from frontend.router_client import Readiness
from frontend.router_connection import Pulse, RouterListener
from frontend.router_pool import RouterPool
from router.counts.requests import CANCELLED
from router.engine import Engine
from router.errors import AlreadyExists, NotTaken, RequestError, ResourceExhausted, RouterUnavailable
from router.model.llama4 import Model
from router.request import LOST, SILENT, GenerationRequest, TokenDelta
from tests.processes import PATIENCE_S
from tests.reference import prompt
from tests.router.engines import greedy, make_engine, run_to_end, tokens_of

PROMPT = prompt(25)
TOKENS = 8
LONG = 30
MANY_STEPS = 300


class SteppedRouter:
    """A RouterConnection to a real engine. Its process can die and come back, hang and thaw.

    answers: whether it is there, as its listener was told. loads: it takes no request, though its
    heartbeat has not said so yet.
    """

    def __init__(self, name: str, model: Model, **limits: int) -> None:
        self.name = name
        self._model, self._limits = model, limits
        self.engine = self._new_engine()
        self.requests: list[GenerationRequest] = []
        self.released: list[tuple[str, str]] = []
        self.draining, self.missing_s = False, 0.0
        self.loads = False
        self.answers, self.is_closed = True, False
        self._undelivered: list[TokenDelta] = []
        self._mail: list[tuple[str, GenerationRequest | str]] = []
        self._listener: RouterListener | None = None  # until a pool knows it

    def start(self, listener: RouterListener) -> None:
        self._listener = listener
        if self.answers:
            self.beat()

    def close(self) -> None:
        assert not self.answers
        self.is_closed = True

    def release(self, call_id: str, keep: str) -> None:
        self.released.append((call_id, keep))

    async def readiness(self) -> Readiness:
        return Readiness(self.answers, "" if self.answers else f"{self.name} is away")

    def submit(self, request: GenerationRequest) -> None:
        assert self.answers
        self._mail.append(("submit", request))

    def cancel(self, request_id: str, ending: str) -> None:
        self._mail.append((ending, request_id))

    @property
    def is_busy(self) -> bool:
        """Whether it answers and has a request, in its mail or its engine."""
        return self.answers and (self.engine.has_work or any(what == "submit" for what, _ in self._mail))

    def step(self) -> None:
        """Read the mail, compute a step and tell what came of it, unless the router does not answer."""
        if self.answers:
            self._read_mail()
            self._deliver(self.engine.step())

    def fail(self, error: RequestError) -> None:
        """Read the mail, and end all that runs or waits, as an engine does whose step fails."""
        self._read_mail()
        self._deliver(self.engine.fail_all(error))

    def step_unheard(self) -> None:
        """Compute a step of which nobody hears before the router answers again."""
        self._undelivered += self.engine.step()

    def fail_unheard(self, error: RequestError) -> None:
        """End all that runs, which nobody hears before the router answers again."""
        self._undelivered += self.engine.fail_all(error)

    def beat(self) -> None:
        stats = self.engine.stats
        self._listener.beat(self.name, Pulse(True, self.draining, stats.running + stats.waiting, self.missing_s))

    def die(self) -> None:
        """Lose the process with all that it knew, also what it had made but not told."""
        self._lose(LOST)
        self.engine = self._new_engine()
        self._undelivered.clear()

    def hang(self) -> None:
        self._lose(SILENT)

    def answer(self) -> None:
        """Be there again: after `die` as a new process, after `hang` as the same."""
        self.answers = True
        self.beat()
        self._deliver([])

    def stop(self) -> None:
        """End all that runs, as an engine does that stops."""
        self.fail(RouterUnavailable(f"{self.name} is stopping"))

    def _lose(self, cause: str) -> None:
        self.answers = False
        self._mail = [entry for entry in self._mail if entry[0] != "submit"]
        self._listener.down(self.name, cause, f"{self.name} is down and being restarted")

    def _read_mail(self) -> None:
        mail, self._mail = self._mail, []
        for what, about in mail:
            if isinstance(about, GenerationRequest):
                self._read(about)
            else:
                self.engine.cancel(about, what)

    def _read(self, request: GenerationRequest) -> None:
        self.requests.append(request)
        if self.loads:
            self._refuse(request, NotTaken(f"{self.name} is loading"))
            return
        try:
            self.engine.submit(request)
        except AlreadyExists:
            pass  # it goes on: see RouterActor.submit
        except ResourceExhausted as error:
            self._refuse(request, error)

    def _refuse(self, request: GenerationRequest, error: RequestError) -> None:
        self._undelivered.append(TokenDelta(request.request_id, error=error))

    def _deliver(self, deltas: Sequence[TokenDelta]) -> None:
        undelivered, self._undelivered = self._undelivered, []
        if self._listener is not None:
            self._listener.deliver(self.name, [*undelivered, *deltas])

    def _new_engine(self) -> Engine:
        return make_engine(self._model, **self._limits)


def pool_of(model: Model, *routers: SteppedRouter, heal_s: float = 60.0) -> RouterPool:
    return RouterPool(routers, make_engine(model).request_limits, heal_s)


async def turn() -> None:
    """Let whoever has been woken run, and whom they wake."""
    for _ in range(6):
        await asyncio.sleep(0)


class Played:
    """A pool over routers of a test, one request after the other, and what their streams have told."""

    def __init__(self, pool: RouterPool, *routers: SteppedRouter) -> None:
        self.pool, self.routers = pool, routers
        self.deltas: list[TokenDelta] = []

    async def begin(self, name: str, max_tokens: int = TOKENS, **more: Any) -> "asyncio.Task[None]":
        request = greedy(name, list(PROMPT), max_tokens)  # a prompt of its own, as every call has
        stream = self.pool.generate([replace(request, **more)])

        async def read() -> None:
            try:
                async for delta in stream:
                    self.deltas.append(delta)
            finally:
                stream.close(CANCELLED)

        reading = asyncio.create_task(read())
        await turn()
        return reading

    async def fill(self, max_tokens: int) -> "list[asyncio.Task[None]]":
        """Let one request run and one wait at each of two routers that have room for no more."""
        readings = []
        for pair in ("01", "23"):
            readings += [await self.begin(name, max_tokens) for name in pair]
            await self.step()
        return readings

    async def step(self, steps: int = 1) -> None:
        for _ in range(steps):
            for router in self.routers:
                router.step()
            await turn()

    async def until_over(self, *reading: "asyncio.Task[None]") -> None:
        for _ in range(MANY_STEPS):
            if all(task.done() for task in reading):
                return
            await self.step()
        raise AssertionError("a stream did not end")

    def tokens(self, name: str) -> list[int]:
        return tokens_of(self.deltas, name)


Play = Callable[..., None]
"""Runs a test of a Played; see `player`."""


def player(model: Model) -> Play:
    def run_it(test: Callable[[Played], Awaitable[None]], count: int = 2, heal_s: float = 60.0, **limits: int) -> None:
        async def played() -> None:
            routers = [SteppedRouter(f"router-{number}", model, **limits) for number in range(count)]
            await test(Played(pool_of(model, *routers, heal_s=heal_s), *routers))

        async def bounded() -> None:
            await asyncio.wait_for(played(), PATIENCE_S)

        asyncio.run(bounded())

    return run_it


def alone(model: Model, max_tokens: int = TOKENS) -> list[int]:
    engine = SteppedRouter("alone", model).engine
    engine.submit(greedy("a", PROMPT, max_tokens))
    return tokens_of(run_to_end(engine), "a")


async def failure_of(reading: "asyncio.Task[None]") -> RequestError:
    with pytest.raises(RequestError) as caught:
        await asyncio.wait_for(reading, PATIENCE_S)
    return caught.value

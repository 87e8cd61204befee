"""A frontend whose way to the router is broken: requests wait, or end and say why, and its event loop goes on."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from cluster import router_client
from cluster.router_client import MAX_RELEASES, RayRouterConnection
from frontend.router_client import Readiness
from frontend.router_pool import RouterPool
from router.errors import Unavailable
from router.request import GenerationRequest, RequestLimits, SamplingParams
from tests.processes import PATIENCE_S

LIMITS = RequestLimits(100, 100, frozenset())
REQUEST = GenerationRequest("a", (1, 2), SamplingParams(4))


class FailingConnection(RayRouterConnection):
    """Cannot find its router. lookups: how often it has tried."""

    def __init__(self, error: Exception) -> None:
        super().__init__("router-0", "nowhere", "frontend", silence_s=PATIENCE_S)
        self.error = error
        self.lookups = 0

    def _look_up(self) -> Any:
        self.lookups += 1
        raise self.error


class DeafConnection(FailingConnection):
    """Finds a router whose every call fails."""

    def _look_up(self) -> Any:
        self.lookups += 1
        return SimpleNamespace(expect_frontend=SimpleNamespace(remote=self._fail_remotely))

    async def _fail_remotely(self, *args: object) -> Readiness:
        raise self.error


class WaitingConnection(RayRouterConnection):
    """Ray's head is away: looking the router up takes until the test ends."""

    def __init__(self) -> None:
        super().__init__("router-0", "nowhere", "frontend", silence_s=PATIENCE_S)
        self.over = threading.Event()
        self.lookups = 0

    def _look_up(self) -> ray.actor.ActorHandle:
        self.lookups += 1
        self.over.wait(PATIENCE_S)
        raise ValueError


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_client, "FIND_TIMEOUT_S", 0.2)
    monkeypatch.setattr(router_client, "RETRY_S", 0.01)


@pytest.fixture
def waiting() -> Iterator[WaitingConnection]:
    connection = WaitingConnection()
    yield connection
    connection.over.set()


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, PATIENCE_S))


async def end_of(pool: RouterPool) -> str:
    with pytest.raises(Unavailable) as caught:
        await anext(pool.generate([REQUEST]))
    return str(caught.value)


FAILURES = [
    ray.exceptions.GetTimeoutError("There was timeout in getting the actor handle"),
    TimeoutError(),
    asyncio.TimeoutError(),
    ValueError("no such actor"),
    ZeroDivisionError("oh"),
]


@pytest.mark.parametrize("connect", [FailingConnection, DeafConnection])
@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_router_that_cannot_be_reached_is_looked_for_again_and_its_requests_end_in_time(
    connect: Callable[[Exception], FailingConnection], error: Exception
) -> None:
    async def scenario() -> None:
        connection = connect(error)
        pool = RouterPool([connection], LIMITS, heal_s=0.0)
        is_unknown = connect is FailingConnection and isinstance(error, ValueError)
        told = "does not exist" if is_unknown else "router-0 is down and being restarted"
        assert told in await end_of(pool)
        readiness = await pool.readiness()
        assert (readiness.ready, told in readiness.detail) == (False, True)
        while connection.lookups < 3:
            await asyncio.sleep(0.01)

    run(scenario())


def test_while_ray_does_not_say_where_the_router_is_the_event_loop_goes_on(waiting: WaitingConnection) -> None:
    async def scenario() -> None:
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0.01)
                turns += 1

        other = asyncio.create_task(others())
        pool = RouterPool([waiting], LIMITS, heal_s=0.0)
        assert "its head may be down" in await end_of(pool)
        answers = await asyncio.gather(*(pool.readiness() for _ in range(3)))
        assert all(not answer.ready and "its head may be down" in answer.detail for answer in answers)
        assert waiting.lookups == 1  # however often it is needed
        assert turns >= 5
        other.cancel()
        waiting.over.set()

    run(scenario())


def test_a_router_that_never_comes_back_costs_bounded_memory() -> None:
    connection = RayRouterConnection("router-0", "nowhere", "frontend", 1.0)
    for number in range(2 * MAX_RELEASES):
        connection.release(f"{number:032x}", keep=f"{number:032x}+1")
    assert list(connection._to_release) == [f"{number:032x}" for number in range(MAX_RELEASES, 2 * MAX_RELEASES)]


def test_a_connection_that_is_closed_looks_no_more_and_leaves_no_thread() -> None:
    async def scenario() -> None:
        connection = FailingConnection(ValueError("no such actor"))
        pool = RouterPool([connection], LIMITS, heal_s=PATIENCE_S)
        reading = asyncio.ensure_future(end_of(pool))
        while connection.lookups < 2:
            await asyncio.sleep(0.01)
        pool.follow([], connect=lambda name: connection)
        await asyncio.sleep(0)  # the cancelled tasks end
        lookups = connection.lookups
        assert connection._keeper is not None
        assert connection._keeper.done()
        await asyncio.to_thread(connection._threads.shutdown)  # returns once its threads have ended
        assert connection.lookups == lookups
        reading.cancel()

    run(scenario())

"""A frontend whose way to the router is broken: its streams end and say why, and its event loop goes on."""

import asyncio
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from cluster import router_client
from cluster.router_client import RayRouterClient
from frontend.router_client import Readiness
from router.errors import Unavailable
from router.request import GenerationRequest, RequestLimits, SamplingParams
from tests.processes import PATIENCE_S

LIMITS = RequestLimits(100, 100, frozenset())
REQUEST = GenerationRequest("a", (1, 2), SamplingParams(4))


class BrokenClient(RayRouterClient):
    """Cannot find its router, for a reason that nobody thought of."""

    def _look_up(self) -> ray.actor.ActorHandle:
        raise ZeroDivisionError("oh")


class FailingOnceClient(RayRouterClient):
    """Its first look-up fails; the second finds a router that fails to say whether it is ready."""

    def __init__(self, error: Exception) -> None:
        super().__init__("router-0", "nowhere", LIMITS)
        self.error = error
        self.lookups = 0

    def _look_up(self) -> Any:
        self.lookups += 1
        if self.lookups == 1:
            raise self.error
        return SimpleNamespace(readiness=SimpleNamespace(remote=self._fail_remotely))

    async def _fail_remotely(self) -> Readiness:
        raise self.error


class WaitingClient(RayRouterClient):
    """Ray's head is away: looking the router up takes until the test ends."""

    def __init__(self) -> None:
        super().__init__("router-0", "nowhere", LIMITS)
        self.over = threading.Event()
        self.lookups = 0

    def _look_up(self) -> ray.actor.ActorHandle:
        self.lookups += 1
        self.over.wait(PATIENCE_S)
        raise ValueError


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[WaitingClient]:
    monkeypatch.setattr(router_client, "FIND_TIMEOUT_S", 0.2)
    client = WaitingClient()
    yield client
    client.over.set()


async def end_of(client: RayRouterClient) -> Exception:
    async def read() -> Exception:
        try:
            async for delta in client.generate([REQUEST]):
                raise AssertionError(delta)
        except Unavailable as error:
            return error
        raise AssertionError("an answer without end")

    return await asyncio.wait_for(read(), PATIENCE_S)


def test_a_defect_on_the_way_to_the_router_ends_the_streams() -> None:
    error = asyncio.run(end_of(BrokenClient("router-0", "nowhere", LIMITS)))
    assert "router-0" in str(error)


FAILURES = [
    ray.exceptions.GetTimeoutError("There was timeout in getting the actor handle"),
    TimeoutError(),
    asyncio.TimeoutError(),
    ValueError("no such actor"),
    ZeroDivisionError("oh"),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_lookup_that_failed_is_made_anew_and_is_not_told_as_one_that_waits(error: Exception) -> None:
    async def scenario() -> None:
        client = FailingOnceClient(error)
        told = "does not exist" if isinstance(error, ValueError) else "is down and being restarted"
        assert told in str(await end_of(client))
        assert client.lookups == 1
        readiness = await client.readiness()
        assert client.lookups == 2
        assert not readiness.ready
        assert "is down and being restarted" in readiness.detail

    asyncio.run(scenario())


def test_while_ray_does_not_say_where_the_router_is_the_event_loop_goes_on(waiting: WaitingClient) -> None:
    async def scenario() -> None:
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0.01)
                turns += 1

        other = asyncio.create_task(others())
        ready = [waiting.readiness() for _ in range(3)]
        answers = await asyncio.wait_for(asyncio.gather(*ready), PATIENCE_S)
        assert {answer.ready for answer in answers} == {False}
        assert all("its head may be down" in answer.detail for answer in answers)
        assert "its head may be down" in str(await end_of(waiting))
        assert waiting.lookups == 1  # however many ask
        assert turns >= 5
        other.cancel()
        waiting.over.set()

    asyncio.run(scenario())

"""Routers that a pool hears of while requests run, and those that it is to forget."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from frontend import router_pool
from frontend.router_connection import RouterConnection
from router.model.llama4 import Model
from tests.frontend.stepped_routers import Played, SteppedRouter, alone, pool_of, turn
from tests.local_model import load_model
from tests.processes import PATIENCE_S
from tests.reference import make_reference

LONG = 30  # tokens


class Scene(Played):
    """Of `names`, only those in `known` are known to the pool at first."""

    def __init__(self, model: Model, names: Sequence[str], known: Sequence[str]) -> None:
        routers = {name: SteppedRouter(name, model) for name in names}
        super().__init__(pool_of(model, *(routers[name] for name in known)), *routers.values())
        self.router = routers

    def follow(self, *names: str) -> None:
        def connect(name: str) -> RouterConnection:
            return self.router[name]

        self.pool.follow(names, connect)

    @property
    def busy(self) -> list[str]:
        return [name for name, router in self.router.items() if router.is_busy]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(make_reference(tmp_path_factory.mktemp("scout"), "scout").directory)


@pytest.fixture
def play(model: Model) -> Callable[..., None]:
    def run_it(test: Callable[[Scene], Awaitable[None]], names: Sequence[str], known: Sequence[str]) -> None:
        async def bounded() -> None:
            await asyncio.wait_for(test(Scene(model, names, known)), PATIENCE_S)

        asyncio.run(bounded())

    return run_it


def test_a_new_router_takes_its_share(play: Callable[..., None], model: Model) -> None:
    async def test(scene: Scene) -> None:
        first = await scene.begin("a", LONG)
        scene.follow("router-0", "router-1")
        second = await scene.begin("b", LONG)
        assert scene.busy == ["router-0", "router-1"]
        await scene.until_over(first, second)
        assert scene.tokens("a") == scene.tokens("b") == alone(model, LONG)

    play(test, ["router-0", "router-1"], ["router-0"])


def test_a_router_that_is_not_wanted_any_more_ends_its_requests_and_is_forgotten_once_it_is_gone(
    play: Callable[..., None],
) -> None:
    async def test(scene: Scene) -> None:
        reading = await scene.begin("a")
        [name] = scene.busy
        [other] = {*scene.router} - {name}
        leaving = scene.router[name]
        leaving.draining = True
        leaving.beat()
        scene.follow(other)
        assert not leaving.is_closed
        await scene.until_over(reading)
        assert scene.router[other].requests == []
        leaving.hang()
        scene.follow(other)
        assert leaving.is_closed
        assert (await scene.pool.readiness()).degraded == ""

    play(test, ["router-0", "router-1"], ["router-0", "router-1"])


def test_what_a_forgotten_router_had_goes_on_at_one_that_comes_later(
    play: Callable[..., None], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_pool, "RETRY_S", 0.001)

    async def test(scene: Scene) -> None:
        reading = await scene.begin("a", LONG)
        await scene.step(4)
        scene.router["router-0"].die()
        scene.follow()
        readiness = await scene.pool.readiness()
        assert (readiness.ready, readiness.detail) == (False, "there is no router")
        late = await scene.begin("late")
        scene.follow("router-1")
        await turn()
        assert scene.busy == ["router-1"]
        await scene.until_over(reading, late)
        assert scene.tokens("a") == alone(model, LONG)

    play(test, ["router-0", "router-1"], ["router-0"])


def test_a_request_of_a_forgotten_router_can_be_cancelled(play: Callable[..., None]) -> None:
    async def test(scene: Scene) -> None:
        reading = await scene.begin("a", LONG)
        scene.router["router-0"].die()
        scene.follow()
        reading.cancel()
        await turn()
        scene.follow("router-1")
        await scene.step(2)
        assert scene.busy == []

    play(test, ["router-0", "router-1"], ["router-0"])

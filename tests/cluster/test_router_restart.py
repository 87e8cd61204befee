"""Streams while a router is killed, restarted or frozen: all that is real but its process, and Ray's calls to it."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoint.tensors import Checkpoint
from cluster import router_client
from cluster.actors.router import RouterSpec
from cluster.actors.specs import router_specs
from frontend.delta_stream import DeltaStream
from frontend.router_pool import RouterPool
from router.model.llama4 import Model
from router.request import request_limits
from tests.cluster.deployment import deployment_config
from tests.cluster.local_routers import Directly, LocalRouter, connections_to
from tests.local_model import load_model
from tests.processes import PATIENCE_S
from tests.reference import make_reference, prompt
from tests.router.engines import alone, greedy, tokens_of

LENGTH = 80  # tokens, which take far longer than to end something
BEAT_S, SILENCE_S = 0.02, 0.3


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reference(tmp_path_factory.mktemp("scout"), "scout").directory


@pytest.fixture(scope="module")
def model(directory: Path) -> Model:
    return load_model(directory)


@pytest.fixture(scope="module")
def whole(model: Model) -> list[int]:
    return alone(model, greedy("a", prompt(9), LENGTH))


class Deployed:
    """Some routers, and one frontend."""

    def __init__(self, spec: RouterSpec, model: Model, count: int) -> None:
        self._spec, self._model = spec, model
        self.routers = [LocalRouter(spec, model) for _ in range(count)]
        self._all = list(self.routers)
        self._connections: list[Directly] = []

    async def open(self) -> None:
        for router in self.routers:
            await router.wait_until_ready()
        self._connections = connections_to(*self.routers, silence_s=SILENCE_S)
        self.pool = RouterPool(self._connections, request_limits(self._model.config), heal_s=PATIENCE_S)
        while not all(router.up for router in self.pool._routers.values()):
            await asyncio.sleep(0.01)

    def restart(self, number: int) -> None:
        """As Ray does with an actor whose process has ended."""
        self.routers[number] = LocalRouter(self._spec, self._model)
        self._all.append(self.routers[number])
        self._connections[number].router = self.routers[number]

    async def begin(self, *names: str) -> list[tuple[str, DeltaStream, list[int]]]:
        """Streams, of each of which the first tokens have come."""
        begun = []
        for name in names:
            stream = self.pool.generate([greedy(name, list(prompt(9)), LENGTH)])
            begun.append((name, stream, tokens_of([await anext(stream)], name)))
        return begun

    def busy(self) -> list[int]:
        """How many requests each router has."""
        stats = [router._engine.stats for router in self.routers if router._engine is not None]
        return [each.running + each.waiting for each in stats]

    def close(self) -> None:
        for router in self._all:
            router.close()


async def rest_of(begun: list[tuple[str, DeltaStream, list[int]]]) -> list[list[int]]:
    """All tokens of each stream, read to its end."""
    for name, stream, made in begun:
        made += tokens_of([delta async for delta in stream], name)
    return [made for _, _, made in begun]


With = Callable[[Callable[[Deployed], Awaitable[None]], int], None]


@pytest.fixture
def with_routers(directory: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> With:
    monkeypatch.setattr(router_client, "RETRY_S", 0.02)
    spec = router_specs(deployment_config(directory, engine={"kv_bytes": 2**20}), Checkpoint.open(directory))[0]
    liveness = replace(spec.links.router_liveness, heartbeat_s=BEAT_S)
    spec = replace(spec, links=replace(spec.links, router_liveness=liveness))

    def run(test: Callable[[Deployed], Awaitable[None]], count: int) -> None:
        async def bounded() -> None:
            deployed = Deployed(spec, model, count)
            try:
                await deployed.open()
                await test(deployed)
            finally:
                deployed.close()

        asyncio.run(asyncio.wait_for(bounded(), PATIENCE_S))

    return run


def test_streams_of_a_killed_router_go_on_at_the_other(with_routers: With, whole: list[int]) -> None:
    async def test(deployed: Deployed) -> None:
        begun = await deployed.begin("a", "b", "c", "d")
        assert deployed.busy() == [2, 2]
        deployed.routers[0].kill()
        assert await rest_of(begun) == [whole] * 4
        stats = (await deployed.routers[1].stats()).engine
        assert stats is not None
        assert stats.replayed == 2

    with_routers(test, 2)


def test_streams_of_the_only_router_go_on_once_it_has_restarted(with_routers: With, whole: list[int]) -> None:
    async def test(deployed: Deployed) -> None:
        begun = await deployed.begin("a", "b")
        deployed.routers[0].kill()
        deployed.restart(0)
        late = asyncio.create_task(deployed.begin("late"))
        assert await rest_of([*begun, *await late]) == [whole] * 3

    with_routers(test, 1)


def test_streams_of_a_frozen_router_go_on_at_the_other_and_it_forgets_them(
    with_routers: With, whole: list[int]
) -> None:
    async def test(deployed: Deployed) -> None:
        begun = await deployed.begin("a", "b")
        frozen = deployed.routers[0]
        frozen.freeze()
        assert await rest_of(begun) == [whole] * 2
        frozen.thaw()
        while deployed.busy() != [0, 0] or (await frozen.stats()).life_lines != 1:
            await asyncio.sleep(0.01)
        assert await rest_of(await deployed.begin("a", "b")) == [whole] * 2  # their ids are free again

    with_routers(test, 2)


def test_streams_of_the_only_router_go_on_when_it_thaws(with_routers: With, whole: list[int]) -> None:
    async def test(deployed: Deployed) -> None:
        begun = await deployed.begin("a", "b")
        [router] = deployed.routers
        router.freeze()
        while (await deployed.pool.readiness()).ready:
            await asyncio.sleep(0.01)
        router.thaw()
        assert await rest_of(begun) == [whole] * 2

    with_routers(test, 1)

"""What a router does while it drains, or while its deployment stops."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoint.tensors import Checkpoint
from cluster.actors.router import RouterSpec
from cluster.actors.specs import router_specs
from cluster.policy.wanted import Orders
from router.errors import NotTaken, Unavailable
from router.model.llama4 import Model
from tests.cluster.deployment import deployment_config
from tests.cluster.local_routers import LocalRouter, Reader
from tests.local_model import load_model
from tests.processes import PATIENCE_S
from tests.reference import make_reference, prompt
from tests.router.engines import alone, greedy, tokens_of


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reference(tmp_path_factory.mktemp("scout"), "scout").directory


@pytest.fixture(scope="module")
def model(directory: Path) -> Model:
    return load_model(directory)


@pytest.fixture(scope="module")
def spec(directory: Path) -> RouterSpec:
    return router_specs(deployment_config(directory, engine={"kv_bytes": 2**20}), Checkpoint.open(directory))[0]


@pytest.mark.parametrize(
    ("doing", "orders", "refusal"),
    [
        ("draining", Orders(is_draining=True), NotTaken),
        ("stopping", Orders(is_stopping=True), Unavailable),
    ],
)
def test_what_it_has_ends_as_always_and_new_requests_are_refused(
    doing: str, orders: Orders, refusal: type[Exception], spec: RouterSpec, model: Model
) -> None:
    async def test(router: LocalRouter) -> None:
        await router.wait_until_ready()
        request, mine, other = greedy("old", prompt(9), 60), Reader(router, "mine"), Reader(router, "other")
        await router.submit("mine", [request])
        deltas = await mine.read()
        await router.follow(orders)
        await router.submit("other", [greedy("new", prompt(5), 1)])
        [refused] = await other.read_to_end()
        assert type(refused.error) is refusal
        if orders.is_stopping:  # one that had begun at another router may go on here
            await router.submit("other", [replace(greedy("begun", prompt(5), 2), made=(7,))])
            assert (await other.read_to_end())[-1].error is None
        assert tokens_of(deltas + await mine.read_to_end_of("old"), "old") == alone(model, request)
        stats = await router.stats()
        assert stats.degraded.startswith("shard-0: not linked yet; shard-1: not linked yet; no living shard has ")
        assert (await router.metrics()).is_degraded
        assert (stats.open_requests, stats.is_stopping) == (0, orders.is_stopping)
        assert (stats.draining_s is not None) == orders.is_draining
        readiness = await router.readiness()
        assert (readiness.ready, readiness.detail) == (False, f"router-0 is {doing}")
        assert router._pulse().draining == orders.is_draining

        await router.follow(Orders())
        await router.submit("mine", [greedy("new", prompt(5), 1)])
        assert (await mine.read_to_end())[-1].error is None

    router = LocalRouter(spec, model)
    try:
        asyncio.run(asyncio.wait_for(test(router), PATIENCE_S))
    finally:
        router.close()

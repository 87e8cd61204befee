"""Who owns a request's id at a router: the actor and its clients in this process, over a real engine, without Ray."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.tensors import Checkpoint
from cluster.actors.router import RouterSpec
from cluster.actors.specs import router_specs
from frontend.delta_stream import DeltaStream
from router.counts.requests import CANCELLED
from router.errors import AlreadyExists
from router.model.llama4 import Model
from router.request import GenerationRequest, TokenDelta
from tests.cluster.deployment import deployment_config
from tests.cluster.local_routers import LocalRouter, Reader, client_of
from tests.local_model import load_model
from tests.reference import make_reference, prompt
from tests.router.engines import alone, greedy, tokens_of

PATIENCE_S = 60.0
ENDLESS = 400  # tokens, which take far longer than any test


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reference(tmp_path_factory.mktemp("scout"), "scout").directory


@pytest.fixture(scope="module")
def model(directory: Path) -> Model:
    return load_model(directory)


@pytest.fixture(scope="module")
def spec(directory: Path) -> RouterSpec:
    return router_specs(deployment_config(directory, engine={"kv_bytes": 2**20}), Checkpoint.open(directory))[0]


@pytest.fixture(scope="module")
def with_router(spec: RouterSpec, model: Model) -> "With":
    def run(test: Callable[[LocalRouter], Awaitable[None]]) -> None:
        async def bounded() -> None:
            router = LocalRouter(spec, model)
            await router.wait_until_ready()
            try:
                await test(router)
            finally:
                router.close()

        asyncio.run(asyncio.wait_for(bounded(), PATIENCE_S))

    return run


With = Callable[[Callable[[LocalRouter], Awaitable[None]]], None]


async def read_all(stream: DeltaStream) -> list[TokenDelta]:
    return [delta async for delta in stream]


def test_a_frontend_that_is_refused_an_id_leaves_the_owners_request_alone(with_router: With, model: Model) -> None:
    async def test(router: LocalRouter) -> None:
        request = greedy("x", prompt(9), 200)
        owner, other = client_of(router), client_of(router)
        stream = owner.generate([request])
        first = await anext(stream)
        refused = other.generate([request])
        with pytest.raises(AlreadyExists, match="of another frontend"):
            await anext(refused)
        refused.close(CANCELLED)
        assert tokens_of([first, *await read_all(stream)], "x") == alone(model, request)

    with_router(test)


@pytest.mark.parametrize("frontend_lives", [True, False])
def test_a_resumed_call_goes_on_at_another_frontend_and_the_broken_one_ends(
    frontend_lives: bool, with_router: With, model: Model
) -> None:
    async def test(router: LocalRouter) -> None:
        broken = greedy("call", prompt(9), ENDLESS)
        expected = alone(model, greedy("whole", prompt(9), 20))
        old, new = Reader(router, "old"), client_of(router)
        await read_all(new.generate([greedy("first", prompt(5), 1)]))  # from now on its mail goes at once
        await router.submit("old", [broken, replace(broken, request_id="call-1")])
        if not frontend_lives:
            router._outboxes.remove("old")
        new.release("call", keep="call+1")
        again = replace(greedy("call+1-0", prompt(9), 20), made=tuple(expected[:3]))
        assert expected[:3] + tokens_of(await read_all(new.generate([again])), "call+1-0") == expected
        await router.wait_until_free("call")
        await router.wait_until_free("call-1")
        ends: list[TokenDelta] = []
        while frontend_lives and len(ends) < 2:
            ends += [delta for delta in await old.read() if delta.is_last]
        assert all(isinstance(delta.error, AlreadyExists) for delta in ends)
        stats = (await router.stats()).engine
        assert stats is not None
        assert (stats.running, stats.waiting) == (0, 0)

    with_router(test)


def test_an_id_that_is_used_again_as_soon_as_it_is_cancelled_does_not_hang(with_router: With, model: Model) -> None:
    async def test(router: LocalRouter) -> None:
        again, client = greedy("x", prompt(5), 6), client_of(router)
        stream = client.generate([greedy("x", prompt(9), ENDLESS)])
        await anext(stream)
        stream.close(CANCELLED)
        try:
            deltas = await read_all(client.generate([again]))
        except AlreadyExists:  # the engine has not read the cancellation yet
            await router.wait_until_free("x")
            deltas = await read_all(client.generate([again]))
        assert tokens_of(deltas, "x") == alone(model, again)

    with_router(test)


def test_a_request_that_is_cancelled_before_it_was_sent_never_runs(with_router: With) -> None:
    async def test(router: LocalRouter) -> None:
        client = client_of(router)
        stream = client.generate([greedy("withdrawn", prompt(9), ENDLESS)])
        reading = asyncio.create_task(anext(stream, None))
        asyncio.get_running_loop().call_soon(stream.close, CANCELLED)  # before the mail, which the reader posts
        assert await reading is None
        await read_all(client.generate([greedy("next", prompt(5), 1)]))
        stats = (await router.stats()).engine
        assert stats is not None
        assert (stats.prompt_tokens, stats.running) == (5, 0)

    with_router(test)


class Stumbling(LocalRouter):
    """Its first cancel fails. The second one sets `recovered`."""

    def __init__(self, spec: RouterSpec, model: Model) -> None:
        super().__init__(spec, model)
        self.cancels = 0
        self.recovered = asyncio.Event()

    async def cancel(self, frontend_id: str, ending_of: Mapping[str, str]) -> None:
        self.cancels += 1
        if self.cancels == 1:
            raise OSError("oh")
        await super().cancel(frontend_id, ending_of)
        self.recovered.set()


def test_what_watches_the_frontends_goes_on_whatever_went_wrong_in_it(spec: RouterSpec, model: Model) -> None:
    async def test() -> None:
        router = Stumbling(replace(spec, frontend_grace_s=0.1), model)
        await router.wait_until_ready()
        many = [greedy(f"forgotten-{n}", prompt(3), ENDLESS) for n in range(100)]  # many seconds of work
        await router.submit("gone", many)
        await router.recovered.wait()
        for request in many:
            await router.wait_until_free(request.request_id)
        router.close()

    asyncio.run(asyncio.wait_for(test(), PATIENCE_S))


def test_only_the_owner_of_a_request_cancels_it(with_router: With, model: Model) -> None:
    async def test(router: LocalRouter) -> None:
        request, mine = greedy("x", prompt(9), 20), Reader(router, "mine")
        await router.submit("mine", [request])
        await router.cancel("another's", {"x": CANCELLED})
        assert tokens_of(await mine.read_to_end(), "x") == alone(model, request)
        await router.submit("mine", [greedy("endless", prompt(9), ENDLESS)])
        await router.cancel("mine", {"endless": CANCELLED})
        await router.submit("mine", [greedy("next", prompt(5), 1)])  # the engine reads its mail in order
        await mine.read_to_end()
        metrics = await router.metrics()
        assert metrics.engine is not None
        assert metrics.engine.requests.ended[CANCELLED] == 1

    with_router(test)


async def ended_but_not_told(router: LocalRouter, request: GenerationRequest) -> None:
    """Run a request until its last delta waits in the event loop's queue; the loop stands still meanwhile."""
    await router.submit("mine", [request])
    assert router.last_posted.wait(PATIENCE_S)


def test_a_request_sent_again_before_its_last_delta_was_told_is_not_run_unseen(with_router: With, model: Model) -> None:
    async def test(router: LocalRouter) -> None:
        request, mine = greedy("x", prompt(9), 4), Reader(router, "mine")
        await ended_but_not_told(router, request)
        await router.submit("mine", [request])
        assert tokens_of(await mine.read_to_end(), "x") == alone(model, request)
        await router.submit("mine", [greedy("next", prompt(5), 1)])  # the engine has then begun all before it
        await mine.read_to_end()
        stats = (await router.stats()).engine
        assert stats is not None
        assert (stats.generated_tokens, stats.running, stats.waiting) == (5, 0, 0)

    with_router(test)


def test_a_cancelled_id_is_in_use_until_the_engine_has_no_more_deltas_of_it(with_router: With, model: Model) -> None:
    async def test(router: LocalRouter) -> None:
        request, again = greedy("x", prompt(9), 4), greedy("x", prompt(5), 6)
        mine = Reader(router, "mine")
        await ended_but_not_told(router, request)
        await router.cancel("mine", {"x": CANCELLED})
        await router.submit("mine", [again])
        [refused] = await mine.read_to_end()
        assert isinstance(refused.error, AlreadyExists)
        await router.wait_until_free("x")
        await router.submit("mine", [again])
        assert tokens_of(await mine.read_to_end(), "x") == alone(model, again)

    with_router(test)


FRONTENDS = ("mine", "another")
MAILED = {name: greedy(name, prompt(5 + nth, seed=nth), 4) for nth, name in enumerate("abc")}
PROBES = {frontend: greedy(f"probe of {frontend}", prompt(9), 12) for frontend in FRONTENDS}

_calls = st.one_of(
    st.tuples(st.sampled_from(["submit", "cancel"]), st.sampled_from(FRONTENDS), st.sampled_from(sorted(MAILED))),
    st.tuples(st.just("pull"), st.sampled_from(FRONTENDS), st.integers(0, 3)),
    st.just(("pause", "", 0)),
)


@pytest.fixture(scope="module")
def right(model: Model) -> dict[str, list[int]]:
    return {request.request_id: alone(model, request) for request in (*MAILED.values(), *PROBES.values())}


@settings(max_examples=25, deadline=None)
@given(calls=st.lists(_calls, min_size=4, max_size=30))
def test_calls_that_come_twice_late_or_out_of_order_hurt_nobody(
    with_router: With, right: dict[str, list[int]], calls: list[tuple[str, str, Any]]
) -> None:
    """A pull comes again with one of the last receipts, while the frontend's own waits."""

    async def test(router: LocalRouter) -> None:
        broken: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: broken.append(context))
        readers = {frontend: Reader(router, frontend) for frontend in FRONTENDS}
        reading = {
            frontend: asyncio.create_task(reader.read_to_end_of(PROBES[frontend].request_id))
            for frontend, reader in readers.items()
        }
        again = []
        for what, frontend, which in calls:
            if what == "submit":
                await router.submit(frontend, [MAILED[which], MAILED[which]])
            elif what == "cancel":
                await router.cancel(frontend, {which: CANCELLED, "unknown": CANCELLED})
            elif what == "pull":
                receipts = readers[frontend].receipts
                again.append(asyncio.create_task(router.pull(frontend, receipts[-1 - which % len(receipts)])))
            else:
                await asyncio.sleep(0.002)
        for frontend, probe in PROBES.items():
            await router.submit(frontend, [probe])
        told = {frontend: await task for frontend, task in reading.items()}
        await asyncio.gather(*again)
        for name in MAILED:
            await router.wait_until_free(name)
        stats = (await router.stats()).engine
        assert stats is not None
        assert (stats.running, stats.waiting, stats.kv_bytes_used) == (0, 0, 0)
        assert not broken
        for frontend, deltas in told.items():
            assert all(delta.error is None or isinstance(delta.error, AlreadyExists) for delta in deltas)
            for name, tokens in right.items():
                was_cancelled = ("cancel", frontend, name) in calls
                for made in runs_of(deltas, name):
                    assert made == (tokens[: len(made)] if was_cancelled else tokens)
            assert tokens_of(deltas, PROBES[frontend].request_id) == right[PROBES[frontend].request_id]

    with_router(test)


def runs_of(deltas: Sequence[TokenDelta], name: str) -> list[list[int]]:
    """The tokens of each time that request `name` ran."""
    runs: list[list[int]] = []
    for delta in deltas:
        if delta.request_id == name and delta.token_ids:
            if delta.first == 0:
                runs.append([])
            runs[-1] += delta.token_ids
    return runs

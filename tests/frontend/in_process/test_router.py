"""The router in the frontend's own process: streams on an event loop, fed by the engine's thread."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from frontend.in_process.router import InProcessRouter
from router.counts.requests import CANCELLED
from router.engine import Engine
from router.errors import AlreadyExists, ResourceExhausted, Unavailable
from router.model.llama4 import Model
from router.request import FinishReason, GenerationRequest, TokenDelta
from tests.local_model import load_model
from tests.processes import PATIENCE_S
from tests.reference import make_reference, prompt
from tests.router.engines import alone, drawn, greedy, make_engine

ENDLESS = 400  # tokens, which take far longer than any test


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(make_reference(tmp_path_factory.mktemp("scout"), "scout").directory)


@asynccontextmanager
async def serving(engine: Engine) -> AsyncIterator[InProcessRouter]:
    router = InProcessRouter(engine)
    try:
        yield router
    finally:
        router.stop(PATIENCE_S)


def run(test: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(test, PATIENCE_S)

    return asyncio.run(bounded())


async def read_all(router: InProcessRouter, request: GenerationRequest) -> list[TokenDelta]:
    return [delta async for delta in router.generate([request])]


def tokens_in(deltas: list[TokenDelta]) -> list[int]:
    return [token_id for delta in deltas for token_id in delta.token_ids]


def ended(router: InProcessRouter) -> dict[str, int]:
    """How many requests ended how, the barrier of `answers_after` among them."""
    return {ending: count for ending, count in router.snapshot.requests.ended.items() if count}


async def answers_after(router: InProcessRouter) -> None:
    """Let the engine answer another request: it has then read all earlier mail, and done what that said."""
    await read_all(router, greedy("barrier", prompt(3), 1))


def test_a_stream_gives_the_tokens_one_by_one_and_ends_with_the_reason(model: Model) -> None:
    async def test() -> list[TokenDelta]:
        async with serving(make_engine(model)) as router:
            return await read_all(router, greedy("a", prompt(9), 5))

    deltas = run(test())
    assert tokens_in(deltas) == alone(model, greedy("a", prompt(9), 5))
    assert [delta.finish_reason for delta in deltas] == [None] * 4 + [FinishReason.LENGTH]


def test_many_streams_at_once_get_their_own_tokens(model: Model) -> None:
    requests = [drawn(f"{n}", prompt(3 + n, seed=n), 6, seed=n) for n in range(16)]

    async def test() -> list[list[TokenDelta]]:
        async with serving(make_engine(model, max_step_tokens=40)) as router:
            return await asyncio.gather(*(read_all(router, request) for request in requests))

    for request, deltas in zip(requests, run(test()), strict=True):
        assert {delta.request_id for delta in deltas} == {request.request_id}
        assert tokens_in(deltas) == alone(model, request)


def test_closing_a_stream_frees_its_work(model: Model) -> None:
    engine = make_engine(model)

    async def test() -> None:
        async with serving(engine) as router:
            stream = router.generate([greedy("a", prompt(9), ENDLESS)])
            await anext(stream)
            assert engine.stats.kv_bytes_used > 0
            stream.close(CANCELLED)
            await answers_after(router)
            assert (engine.stats.kv_bytes_used, engine.stats.running) == (0, 0)

    run(test())


@pytest.mark.parametrize("ending", ["cancelled", "stop"])
def test_a_closed_stream_is_counted_as_its_reader_says(model: Model, ending: str) -> None:
    async def test() -> None:
        async with serving(make_engine(model)) as router:
            stream = router.generate([greedy("a", prompt(9), ENDLESS)])
            await anext(stream)
            stream.close(ending)
            await answers_after(router)
            assert ended(router) == {ending: 1, "length": 1}

    run(test())


def test_cancelling_the_task_that_reads_a_stream_frees_its_work(model: Model) -> None:
    engine = make_engine(model)

    async def test() -> None:
        async with serving(engine) as router:
            begun = asyncio.Event()

            async def read() -> None:
                async for _ in router.generate([greedy("a", prompt(9), ENDLESS)]):
                    begun.set()

            reading = asyncio.create_task(read())
            await begun.wait()
            assert engine.stats.running == 1
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            await answers_after(router)
            assert (engine.stats.kv_bytes_used, engine.stats.running) == (0, 0)

    run(test())


def test_closing_one_stream_leaves_the_others_alone(model: Model) -> None:
    async def test() -> list[TokenDelta]:
        async with serving(make_engine(model)) as router:
            closing = router.generate([greedy("closed", prompt(9), ENDLESS)])
            staying = asyncio.create_task(read_all(router, greedy("stays", prompt(5), 20)))
            await anext(closing)
            closing.close(CANCELLED)
            return await staying

    assert tokens_in(run(test())) == alone(model, greedy("stays", prompt(5), 20))


def test_an_id_in_use_is_refused_and_the_request_that_has_it_goes_on(model: Model) -> None:
    request = greedy("a", prompt(9), 20)

    async def test() -> list[TokenDelta]:
        async with serving(make_engine(model)) as router:
            stream = router.generate([request])
            first = await anext(stream)
            refused = router.generate([request])
            with pytest.raises(AlreadyExists, match="under way already"):
                await anext(refused)
            refused.close(CANCELLED)
            return [first, *[delta async for delta in stream]]

    assert tokens_in(run(test())) == alone(model, request)


def test_a_stream_that_was_never_read_costs_nothing(model: Model) -> None:
    engine = make_engine(model)

    async def test() -> None:
        async with serving(engine) as router:
            stream = router.generate([greedy("a", prompt(9), ENDLESS)])
            stream.close(CANCELLED)
            await answers_after(router)

    run(test())
    assert engine.stats.prompt_tokens == 3  # of the barrier


def test_a_refusal_is_raised_where_the_stream_is_read(model: Model) -> None:
    async def test() -> None:
        async with serving(make_engine(model, kv_positions=10)) as router:
            with pytest.raises(ResourceExhausted, match=r"engine\.kv_bytes"):
                await read_all(router, greedy("a", prompt(9), 5))

    run(test())


def test_a_router_that_closes_ends_open_streams_as_unavailable(model: Model) -> None:
    async def test() -> None:
        async with serving(make_engine(model, max_running=1)) as router:
            running = router.generate([greedy("running", prompt(9), ENDLESS)])
            await anext(running)
            waiting = asyncio.create_task(read_all(router, greedy("waiting", prompt(9), ENDLESS)))
            await asyncio.sleep(0)  # lets the task submit its request
            router.stop(PATIENCE_S)
            for stream in (read_to_the_end(running), waiting):
                with pytest.raises(Unavailable, match="the router is stopping"):
                    await stream

    run(test())


async def read_to_the_end(stream: AsyncIterator[TokenDelta]) -> None:
    async for _ in stream:
        pass


def test_a_closed_router_is_unavailable(model: Model) -> None:
    async def test() -> None:
        async with serving(make_engine(model)) as router:
            router.stop(PATIENCE_S)
            with pytest.raises(Unavailable, match="the router is stopping"):
                await read_all(router, greedy("late", prompt(9)))

    run(test())


def test_limits_and_readiness_are_the_engines(model: Model) -> None:
    async def test() -> None:
        engine = make_engine(model)
        async with serving(engine) as router:
            assert await router.limits() == engine.request_limits
            assert (await router.readiness()).ready

    run(test())


def test_it_tells_what_its_engine_has_counted(model: Model) -> None:
    async def test() -> None:
        async with serving(make_engine(model)) as router:
            await read_all(router, greedy("a", prompt(9), 5))
            assert router.snapshot.stats.generated_tokens == 5
            assert router.snapshot.requests.ended["length"] == 1

    run(test())

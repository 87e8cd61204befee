"""Which router has a request, and what becomes of it when that one goes: real engines, which a test steps by hand."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from frontend import router_pool
from frontend.router_pool import MAX_LOSSES
from frontend.running_request import RunningRequest
from router.counts.requests import CANCELLED
from router.errors import DeadlineExceeded, ExpertsAway, Internal, ResourceExhausted, Resumed, Unavailable
from router.model.llama4 import Model
from router.request import LOST, RESUMED, SILENT, UNAVAILABLE, GenerationRequest, SamplingParams
from tests.frontend.stepped_routers import PROMPT, TOKENS, Played, SteppedRouter, alone, failure_of, pool_of, turn
from tests.local_model import load_model
from tests.processes import PATIENCE_S
from tests.reference import make_reference
from tests.router.engines import greedy, run_to_end

Play = Callable[[Played], Awaitable[None]]
LONG = 30  # tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(make_reference(tmp_path_factory.mktemp("scout"), "scout").directory)


@pytest.fixture
def play(model: Model) -> Callable[..., None]:
    def run_it(test: Play, count: int = 2, heal_s: float = 60.0, **limits: int) -> None:
        async def played() -> None:
            routers = [SteppedRouter(f"router-{number}", model, **limits) for number in range(count)]
            await test(Played(pool_of(model, *routers, heal_s=heal_s), *routers))

        async def bounded() -> None:
            await asyncio.wait_for(played(), PATIENCE_S)

        asyncio.run(bounded())

    return run_it


def test_what_the_prefix_cache_held_is_told_once(play: Callable[..., None]) -> None:
    async def test(played: Played) -> None:
        for router in played.routers:  # both have the prompt in their caches
            router.engine.submit(greedy("before", PROMPT, 1))
            run_to_end(router.engine)
        reading = await played.begin("a")
        await played.step(3)
        assert played.tokens("a")
        busy = next(router for router in played.routers if router.engine.has_work)
        busy.die()
        await played.until_over(reading)
        assert [delta.cached_tokens for delta in played.deltas] == [24, *[0] * (TOKENS - 1)]

    play(test)


def test_the_only_router_gets_its_requests_back_once_it_has_restarted(play: Callable[..., None], model: Model) -> None:
    async def test(played: Played) -> None:
        [router] = played.routers
        readings = [await played.begin("a"), await played.begin("b")]
        await played.step(4)
        router.die()
        late = await played.begin("late")  # it waits, too
        await played.step(3)
        assert not any(reading.done() for reading in (*readings, late))
        router.answer()
        await played.until_over(*readings, late)
        assert played.tokens("a") == played.tokens("b") == played.tokens("late") == alone(model)
        assert router.engine.snapshot.requests.replayed == {LOST: 2, SILENT: 0, UNAVAILABLE: 0, RESUMED: 0}

    play(test, count=1)


def test_a_router_that_was_only_silent_goes_on_with_what_it_has(play: Callable[..., None], model: Model) -> None:
    async def test(played: Played) -> None:
        [router] = played.routers
        reading = await played.begin("a")
        await played.step(3)
        router.hang()
        router.step_unheard()
        router.step_unheard()
        router.answer()
        await played.until_over(reading)
        assert played.tokens("a") == alone(model)
        stats = router.engine.stats
        assert (stats.replayed, stats.prompt_tokens, stats.generated_tokens) == (0, len(PROMPT), TOKENS)

    play(test, count=1)


def test_a_hung_router_is_told_to_forget_what_another_has_taken_over(play: Callable[..., None], model: Model) -> None:
    async def test(played: Played) -> None:
        reading = await played.begin("a", LONG)
        await played.step(5)
        hung, other = sorted(played.routers, key=lambda router: not router.engine.has_work)
        told = played.tokens("a")
        hung.hang()
        hung.step_unheard()
        await played.step(3)
        assert other.requests[-1].made == tuple(told)  # only what is left is made again
        hung.answer()
        await played.until_over(reading)
        assert played.tokens("a") == alone(model, LONG)
        assert not hung.engine.has_work
        assert hung.engine.snapshot.requests.ended["moved"] == 1
        assert other.engine.snapshot.requests.replayed[SILENT] == 1

    play(test)


def test_what_a_hung_router_says_of_a_request_that_another_has_is_for_nobody(
    play: Callable[..., None], model: Model
) -> None:
    async def test(played: Played) -> None:
        reading = await played.begin("a")
        await played.step(5)
        hung, _ = sorted(played.routers, key=lambda router: not router.engine.has_work)
        hung.hang()
        hung.fail_unheard(Internal("it could not be computed"))
        await played.step(1)
        hung.answer()
        await played.until_over(reading)
        assert played.tokens("a") == alone(model)

    play(test)


def test_a_request_may_come_back_to_a_router_that_still_has_it(play: Callable[..., None], model: Model) -> None:
    async def test(played: Played) -> None:
        reading = await played.begin("a", LONG)
        await played.step(5)
        first, second = sorted(played.routers, key=lambda router: not router.engine.has_work)
        first.hang()
        await played.step(3)
        second.die()
        first.answer()
        await played.until_over(reading)
        assert played.tokens("a") == alone(model, LONG)

    play(test)


def test_without_a_router_a_request_waits_for_heal_s_and_hears_why(
    play: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_pool, "RETRY_S", 0.01)

    async def test(played: Played) -> None:
        [router] = played.routers
        reading = await played.begin("a", LONG)
        await played.step(3)
        router.die()
        error = await failure_of(reading)
        assert isinstance(error, Unavailable)
        assert "router-0 is down and being restarted" in str(error)
        late = await played.begin("a", 2)  # its id is free again
        router.answer()
        await played.until_over(late)

    play(test, count=1, heal_s=0.05)


def test_the_clients_deadline_goes_on_while_a_request_waits(
    play: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_pool, "RETRY_S", 0.01)

    async def test(played: Played) -> None:
        [router] = played.routers
        reading = await played.begin("a", timeout_s=0.2)
        await played.step(2)
        router.die()
        assert isinstance(await failure_of(reading), DeadlineExceeded)
        other = await played.begin("b", timeout_s=PATIENCE_S)
        router.answer()
        await played.until_over(other)
        assert router.requests[-1].timeout_s < PATIENCE_S

    play(test, count=1)


def test_a_full_queue_sends_a_new_request_to_another_router_and_then_refuses_it(play: Callable[..., None]) -> None:
    async def test(played: Played) -> None:
        readings = await played.fill(TOKENS)
        assert [router.engine.stats.waiting for router in played.routers] == [1, 1]
        full = await played.begin("one too many")
        await played.step(2)
        assert isinstance(await failure_of(full), ResourceExhausted)
        await played.until_over(*readings)

    play(test, max_running=1, max_waiting=1)


def test_a_request_that_was_accepted_once_is_not_refused_for_a_full_queue(
    play: Callable[..., None], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_pool, "RETRY_S", 0.001)

    async def test(played: Played) -> None:
        readings = await played.fill(TOKENS)
        played.routers[0].die()
        await played.until_over(*readings)
        assert all(played.tokens(f"{n}") == alone(model) for n in range(4))

    play(test, max_running=1, max_waiting=1)


def test_a_request_of_which_routers_die_is_not_sent_to_all_of_them(play: Callable[..., None]) -> None:
    async def test(played: Played) -> None:
        reading = await played.begin("poison")
        for _ in range(MAX_LOSSES):
            busy = next(router for router in played.routers if router.is_busy)
            busy.die()
            busy.answer()
            await turn()
        assert isinstance(await failure_of(reading), Internal)
        assert not any(router.engine.has_work for router in played.routers)

    play(test, count=MAX_LOSSES + 1)


def test_a_cancelled_request_is_not_sent_again(play: Callable[..., None]) -> None:
    async def test(played: Played) -> None:
        [router] = played.routers
        reading = await played.begin("a", LONG)
        await played.step(3)
        router.hang()
        reading.cancel()
        await turn()
        router.answer()
        await played.step(3)
        assert not router.engine.has_work
        assert router.engine.snapshot.requests.ended[CANCELLED] == 1

    play(test, count=1)


def test_nothing_new_goes_to_a_router_that_drains(play: Callable[..., None]) -> None:
    async def test(played: Played) -> None:
        draining, other = played.routers
        await played.pool.readiness()
        draining.draining = True
        draining.beat()
        readings = [await played.begin(f"{n}", 2) for n in range(4)]
        await played.until_over(*readings)
        assert (len(draining.requests), len(other.requests)) == (0, 4)

    play(test)


def test_a_router_that_has_drained_did_not_die_of_its_requests(play: Callable[..., None], model: Model) -> None:
    async def test(played: Played) -> None:
        reading = await played.begin("a")
        for _ in range(MAX_LOSSES + 1):
            busy = next(router for router in played.routers if router.is_busy)
            busy.draining = True
            busy.beat()
            busy.die()
            busy.draining = False
            busy.answer()
            await turn()
        await played.until_over(reading)
        assert played.tokens("a") == alone(model)
        assert sum(router.engine.snapshot.requests.replayed[UNAVAILABLE] for router in played.routers) == 1

    play(test)


def test_requests_leave_a_router_that_misses_experts_for_one_that_misses_none(
    play: Callable[..., None], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_pool, "WELL_S", 0.0)

    async def test(played: Played) -> None:
        reading = await played.begin("a", LONG)
        await played.step(3)
        cut_off, other = sorted(played.routers, key=lambda router: not router.is_busy)
        for missing_s in (0.5, 1.5):
            cut_off.missing_s = missing_s
            cut_off.beat()
            assert cut_off.is_busy  # it waits for the shard
            await turn()
            assert other.is_busy == (missing_s > 1)
        new = await played.begin("b", 2)
        await played.until_over(reading, new)
        assert played.tokens("a") == alone(model, LONG)
        assert {request.request_id for request in other.requests} == {"a", "b"}
        assert not cut_off.engine.has_work

    play(test)


def test_a_request_whose_experts_are_away_tries_each_router_once_and_then_hears_of_it(
    play: Callable[..., None], model: Model
) -> None:
    async def test(played: Played) -> None:
        reading = await played.begin("a", LONG)
        await played.step(3)
        first, second = sorted(played.routers, key=lambda router: not router.is_busy)
        for router in (first, second, first):  # it got on at the second before
            router.fail(ExpertsAway("expert shard 1 is away"))
            await played.step(3)
            assert not reading.done()
        for router in (second, first):
            assert router.is_busy
            router.fail(ExpertsAway("expert shard 1 is away"))
        assert "expert shard 1 is away" in str(await failure_of(reading))

    play(test)


def test_requests_stay_where_they_are_while_no_router_reaches_a_shard(play: Callable[..., None]) -> None:
    async def test(played: Played) -> None:
        reading = await played.begin("a", LONG)
        await played.step(3)
        busy, other = sorted(played.routers, key=lambda router: not router.is_busy)
        for router in (busy, other, busy, other):
            router.missing_s = 1.5
            router.beat()
        other.missing_s = 0.0  # it is the first that reaches the shard again
        other.beat()
        busy.beat()
        new = await played.begin("b", 2)
        busy.missing_s = 0.0
        busy.beat()
        await played.until_over(reading, new)
        assert [request.request_id for request in busy.requests] == ["a"]
        assert [request.request_id for request in other.requests] == ["b"]

    play(test)


def test_answers_to_one_prompt_go_to_one_router(play: Callable[..., None]) -> None:
    async def test(played: Played) -> None:
        stream = played.pool.generate([greedy(f"a-{index}", PROMPT, 2) for index in range(4)])
        reading = asyncio.ensure_future(anext(stream))
        await played.until_over(reading)
        stream.close(CANCELLED)
        assert sorted(len(router.requests) for router in played.routers) == [0, 4]

    play(test)


def test_readiness_is_that_of_any_router(play: Callable[..., None]) -> None:
    async def test(played: Played) -> None:
        first, second = played.routers
        assert (await played.pool.readiness()).ready
        first.hang()
        readiness = await played.pool.readiness()
        assert (readiness.ready, readiness.degraded) == (True, "router-0 is down and being restarted")
        second.die()
        readiness = await played.pool.readiness()
        assert (readiness.ready, readiness.detail) == (False, "router-0 is away; router-1 is away")

    play(test)


def test_a_call_that_was_resumed_elsewhere_ends_and_is_not_sent_again(play: Callable[..., None]) -> None:
    async def test(played: Played) -> None:
        reading, other = await played.begin("call", LONG), await played.begin("other", LONG)
        await played.step(3)
        busy = next(router for router in played.routers if "call" in {r.request_id for r in router.requests})
        busy.die()
        busy.answer()
        await played.step(3)
        played.pool.release("call", keep="call+1")
        assert isinstance(await failure_of(reading), Resumed)
        await played.until_over(other)
        assert [router.released for router in played.routers] == [[("call", "call+1")]] * 2
        assert not any(router.engine.has_work for router in played.routers)

    play(test)


def test_what_another_frontend_has_resumed_is_not_sent_again(play: Callable[..., None]) -> None:
    async def test(played: Played) -> None:
        reading = await played.begin("call", LONG)
        await played.step(3)
        busy = next(router for router in played.routers if router.is_busy)
        busy.die()
        await played.step(3)
        for router in played.routers:
            router.fail_unheard(Resumed())
        await played.step()
        assert isinstance(await failure_of(reading), Resumed)

    play(test)


def test_what_a_client_says_to_resume_is_counted_but_let_in_like_any_new_request() -> None:
    """Its client tries again. Anybody can say it."""
    running = RunningRequest.of(GenerationRequest("a", (1,), SamplingParams(9), made=(5,), replayed=RESUMED), 0.0)
    assert (running.replayed, running.rest(0.0).replayed) == ("", RESUMED)
    running.replayed = LOST
    assert running.rest(0.0).replayed == LOST

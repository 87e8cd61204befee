"""Which router has a request: real engines, which a test steps by hand."""

import asyncio

import pytest

from frontend import router_pool
from frontend.running_request import RunningRequest
from router.counts.requests import CANCELLED
from router.errors import ExpertsAway, ResourceExhausted
from router.model.llama4 import Model
from router.request import LOST, RESUMED, GenerationRequest, SamplingParams
from tests.frontend.stepped_routers import LONG, PROMPT, TOKENS, Play, Played, alone, failure_of, player, turn
from tests.local_model import load_model
from tests.reference import make_reference
from tests.router.engines import greedy


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(make_reference(tmp_path_factory.mktemp("scout"), "scout").directory)


@pytest.fixture
def play(model: Model) -> Play:
    return player(model)


def test_a_full_queue_sends_a_new_request_to_another_router_and_then_refuses_it(play: Play) -> None:
    async def test(played: Played) -> None:
        readings = await played.fill(TOKENS)
        assert [router.engine.stats.waiting for router in played.routers] == [1, 1]
        full = await played.begin("one too many")
        await played.step(2)
        assert isinstance(await failure_of(full), ResourceExhausted)
        await played.until_over(*readings)

    play(test, max_running=1, max_waiting=1)


def test_a_request_that_was_accepted_once_is_not_refused_for_a_full_queue(
    play: Play, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_pool, "RETRY_S", 0.001)

    async def test(played: Played) -> None:
        readings = await played.fill(TOKENS)
        played.routers[0].die()
        await played.until_over(*readings)
        assert all(played.tokens(f"{n}") == alone(model) for n in range(4))

    play(test, max_running=1, max_waiting=1)


def test_a_request_that_a_loading_router_refused_waits_its_turn_at_another(play: Play) -> None:
    async def test(played: Played) -> None:
        loading, other = played.routers
        loading.loads = True
        readings = [await played.begin(f"{n}", 2) for n in range(4)]  # spread over both
        assert {request.request_id for request in other.requests} == set()
        await played.until_over(*readings)
        refused = [request.request_id for request in loading.requests]
        others = [request.request_id for request in other.requests]
        assert len(refused) == 2
        assert others[-2:] == refused  # they came last
        assert [request.replayed for request in other.requests] == [""] * 4
        ends = [delta.request_id for delta in played.deltas if delta.is_last]
        assert ends == others

    play(test, max_running=1)


def test_nothing_new_goes_to_a_router_that_drains(play: Play) -> None:
    async def test(played: Played) -> None:
        draining, other = played.routers
        await played.pool.readiness()
        draining.draining = True
        draining.beat()
        readings = [await played.begin(f"{n}", 2) for n in range(4)]
        await played.until_over(*readings)
        assert (len(draining.requests), len(other.requests)) == (0, 4)

    play(test)


def test_requests_leave_a_router_that_misses_experts_for_one_that_misses_none(
    play: Play, model: Model, monkeypatch: pytest.MonkeyPatch
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


def test_a_request_whose_experts_are_away_tries_each_router_once_and_then_hears_of_it(play: Play, model: Model) -> None:
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


def test_requests_stay_where_they_are_while_no_router_reaches_a_shard(play: Play) -> None:
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


def test_answers_to_one_prompt_go_to_one_router(play: Play) -> None:
    async def test(played: Played) -> None:
        stream = played.pool.generate([greedy(f"a-{index}", PROMPT, 2) for index in range(4)])
        reading = asyncio.ensure_future(anext(stream))
        await played.until_over(reading)
        stream.close(CANCELLED)
        assert sorted(len(router.requests) for router in played.routers) == [0, 4]

    play(test)


def test_readiness_is_that_of_any_router(play: Play) -> None:
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


def test_what_a_client_says_to_resume_is_counted_but_let_in_like_any_new_request() -> None:
    """Its client tries again. Anybody can say it."""
    running = RunningRequest.of(GenerationRequest("a", (1,), SamplingParams(9), made=(5,), replayed=RESUMED), 0.0)
    assert (running.replayed, running.rest(0.0).replayed) == ("", RESUMED)
    running.replayed = LOST
    assert running.rest(0.0).replayed == LOST

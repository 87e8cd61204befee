"""What becomes of a request when its router goes: real engines, which a test steps by hand."""

import pytest

from frontend import router_pool
from frontend.router_pool import MAX_LOSSES
from router.counts.requests import CANCELLED
from router.errors import DeadlineExceeded, Internal, Resumed, Unavailable
from router.model.llama4 import Model
from router.request import LOST, RESUMED, SILENT, UNAVAILABLE
from tests.frontend.stepped_routers import LONG, PROMPT, TOKENS, Play, Played, alone, failure_of, player, turn
from tests.local_model import load_model
from tests.processes import PATIENCE_S
from tests.reference import make_reference
from tests.router.engines import greedy, run_to_end


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(make_reference(tmp_path_factory.mktemp("scout"), "scout").directory)


@pytest.fixture
def play(model: Model) -> Play:
    return player(model)


def test_what_the_prefix_cache_held_is_told_once(play: Play) -> None:
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


def test_the_only_router_gets_its_requests_back_once_it_has_restarted(play: Play, model: Model) -> None:
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


def test_a_router_that_was_only_silent_goes_on_with_what_it_has(play: Play, model: Model) -> None:
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


def test_a_hung_router_is_told_to_forget_what_another_has_taken_over(play: Play, model: Model) -> None:
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


def test_what_a_hung_router_says_of_a_request_that_another_has_is_for_nobody(play: Play, model: Model) -> None:
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


def test_a_request_may_come_back_to_a_router_that_still_has_it(play: Play, model: Model) -> None:
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


def test_without_a_router_a_request_waits_for_heal_s_and_hears_why(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_clients_deadline_goes_on_while_a_request_waits(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_request_of_which_routers_die_is_not_sent_to_all_of_them(play: Play) -> None:
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


def test_a_cancelled_request_is_not_sent_again(play: Play) -> None:
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


def test_a_router_that_has_drained_did_not_die_of_its_requests(play: Play, model: Model) -> None:
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


def test_a_call_that_was_resumed_elsewhere_ends_and_is_not_sent_again(play: Play) -> None:
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


def test_what_another_frontend_has_resumed_is_not_sent_again(play: Play) -> None:
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

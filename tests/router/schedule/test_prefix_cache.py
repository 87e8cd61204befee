"""Requests that begin the same compute it once: by example, with the plain scheduler and with the real model."""

import pytest

from router.model.llama4 import Model
from router.request import GenerationRequest
from router.schedule.scheduler import Scheduler
from tests.reference import prompt
from tests.router.engines import (
    LIKE_SCOUT,
    PLAIN,
    WORD,
    alone,
    counters_of,
    drawn,
    greedy,
    layout_of,
    make_engine,
    make_scheduler,
    name_of,
    request,
    run_step,
    run_steps,
    run_to_end,
    tokens_of,
)

TOKENS = tuple(range(100, 140))


def serve(scheduler: Scheduler, *requests: GenerationRequest) -> list[list[tuple[str, int, int]]]:
    for each in requests:
        scheduler.enqueue(each)
    return run_steps(scheduler)


@pytest.mark.parametrize(
    ("length", "in_common", "first"),
    [
        pytest.param(30, 12, 12, id="inside the second chunk"),
        pytest.param(30, 8, 8, id="at a chunk's end"),
        pytest.param(30, 9, 8, id="inside a block"),
        pytest.param(30, 1, 0, id="less than a block"),
        pytest.param(13, 13, 12, id="the whole prompt"),
        pytest.param(12, 12, 10, id="the whole prompt in whole blocks"),
    ],
)
def test_a_prompt_is_computed_from_where_it_differs(length: int, in_common: int, first: int) -> None:
    scheduler = make_scheduler(layout=LIKE_SCOUT)
    serve(scheduler, request("before", TOKENS, max_tokens=1))
    prompt_tokens = TOKENS[:in_common] + tuple(range(500, 500 + length - in_common))
    [[(_, start, _)], *_] = serve(scheduler, request("after", prompt_tokens, max_tokens=1))
    assert start == first
    assert scheduler.counters.prefix_hit_tokens == first


def test_answers_are_part_of_the_prefix_that_a_conversation_goes_on_from() -> None:
    scheduler = make_scheduler()
    serve(scheduler, request("question", TOKENS[:5], max_tokens=4))
    [[(_, first, _)]] = serve(scheduler, request("next", (*TOKENS[:5], 2, 2, 2, 2, 77), max_tokens=1))
    assert first == 8  # the answer's last token was never computed


def test_without_the_prefix_cache_everything_is_computed_again() -> None:
    scheduler = make_scheduler(prefix_cache=False)
    for name in "ab":
        steps = serve(scheduler, request(name, TOKENS, max_tokens=1))
        assert steps == [[(name, 0, 40)]]
    assert scheduler.counters.prefix_queried_tokens == 0


def test_without_the_prefix_cache_nothing_is_kept() -> None:
    scheduler = make_scheduler(prefix_cache=False)
    serve(scheduler, request("a", TOKENS, max_tokens=1))
    assert scheduler.kv_bytes_cached == 0


def test_who_wants_logprobs_of_its_prompt_has_it_computed() -> None:
    scheduler = make_scheduler()
    serve(scheduler, request("before", TOKENS, max_tokens=1))
    assert serve(scheduler, request("after", TOKENS, max_tokens=1, prompt_logprobs=0)) == [[("after", 0, 40)]]


def test_memory_that_nobody_holds_is_cached_and_not_used() -> None:
    scheduler = make_scheduler(kv_units=30)
    serve(scheduler, request("a", TOKENS[:10], max_tokens=3))  # 12 tokens are computed
    assert (scheduler.kv_bytes_used, scheduler.kv_bytes_cached) == (0, 6 * PLAIN.unit_bytes)


def test_the_prefix_that_was_longest_unused_makes_room() -> None:
    scheduler = make_scheduler(kv_units=12)
    early, late = TOKENS[:8], TOKENS[20:28]
    for name, prompt_tokens in {"1": early, "2": late, "3": early, "large": 16}.items():
        serve(scheduler, request(name, prompt_tokens, max_tokens=1))
    [[(_, first_of_early, _)]] = serve(scheduler, request("4", early, max_tokens=1))
    [[(_, first_of_late, _)]] = serve(scheduler, request("5", late, max_tokens=1))
    assert (first_of_early, first_of_late) == (6, 0)


# Requests that come at once.


def test_identical_prompts_at_once_are_computed_once() -> None:
    scheduler = make_scheduler()
    steps = serve(scheduler, *(request(name, TOKENS[:13], max_tokens=1) for name in "abcd"))
    assert steps == [[("a", 0, 13)], [("b", 12, 1), ("c", 12, 1), ("d", 12, 1)]]
    counters = scheduler.counters
    assert (counters.prefix_queried_tokens, counters.prefix_hit_tokens) == (4 * 13, 3 * 12)


def test_a_request_waits_while_another_computes_its_prefix_and_others_overtake_it() -> None:
    scheduler = make_scheduler(max_step_tokens=8)
    first, same = request("first", TOKENS[:12], max_tokens=1), request("same", TOKENS[:20], max_tokens=1)
    assert serve(scheduler, first, same, request("other", 4, max_tokens=1)) == [
        [("first", 0, 8)],
        [("first", 8, 4), ("other", 0, 4)],
        [("same", 12, 8)],
    ]


def test_who_waits_for_a_prefix_does_not_look_for_it_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make_scheduler(max_step_tokens=8)
    for name in ("first", "same"):
        scheduler.enqueue(request(name, TOKENS[:32]))
    run_step(scheduler)
    monkeypatch.setattr(scheduler.pool, "find", None)
    assert [run_step(scheduler) for _ in range(3)] == [[("first", 8, 8)], [("first", 16, 8)], [("first", 24, 8)]]


def test_who_waits_for_room_does_not_look_for_its_prefix_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only when room has changed; a long prompt has thousands of blocks to look for."""
    scheduler = make_scheduler(layout=layout_of(1, 0, block_tokens=16, chunk_tokens=64), kv_units=6)
    prompt_tokens = tuple(range(100, 180))
    serve(scheduler, request("before", prompt_tokens, max_tokens=1))
    scheduler.enqueue(request("running", 3, max_tokens=30))
    scheduler.enqueue(request("large", prompt_tokens, max_tokens=1))
    looked_up: list[object] = []
    find = scheduler.pool.find
    monkeypatch.setattr(scheduler.pool, "find", lambda key: looked_up.append(key) or find(key))
    per_step = []
    for _ in range(20):
        run_step(scheduler)
        per_step.append(len(looked_up))
        looked_up.clear()
    assert [step for step, count in enumerate(per_step) if count] == [0, 15]  # step 14 took a block
    assert scheduler.num_waiting == 1


def test_a_request_does_not_wait_for_the_block_with_its_last_token() -> None:
    scheduler = make_scheduler()
    [step, *_] = serve(scheduler, request("long", TOKENS), request("short", TOKENS[:2]))
    assert step == [("long", 0, 40), ("short", 0, 2)]


def test_who_waits_for_a_prefix_computes_it_when_nobody_else_does_any_more() -> None:
    scheduler = make_scheduler(max_step_tokens=4)
    scheduler.enqueue(request("first", TOKENS[:12]))
    scheduler.enqueue(request("same", TOKENS[:20]))
    run_step(scheduler)
    scheduler.remove("first")
    assert run_step(scheduler) == [("same", 4, 4)]


def test_what_a_request_finds_again_after_it_gave_way_is_no_hit() -> None:
    scheduler = make_scheduler(kv_units=6)
    for name in "ab":
        scheduler.enqueue(request(name, 3, max_tokens=6))
    pieces = []
    while scheduler.request_ids:
        for work in scheduler.schedule():
            scheduler.advance(work, WORD if work.samples else None, frozenset())
            pieces.append((name_of(work), work.first, work.length, work.sequence.cached_tokens))
    assert ("b", 4, 3, 0) in pieces
    assert (scheduler.counters.prefix_queried_tokens, scheduler.counters.prefix_hit_tokens) == (6, 0)


# The real model, with blocks of 4 tokens and attention chunks of 16.

SHARED = [
    greedy(f"{in_common} of {length} in common", (*prompt(in_common), *prompt(length - in_common, seed=length)), 8)
    for in_common, length in ((0, 20), (3, 9), (16, 20), (23, 30), (32, 33), (37, 60), (48, 50))
]
ALL_SHARED = [*SHARED, greedy("the same", prompt(48), 8), drawn("the same, drawn", prompt(48), 8)]


@pytest.mark.parametrize("request_", ALL_SHARED, ids=lambda request: request.request_id)
def test_a_request_that_finds_its_prefix_gets_the_tokens_it_gets_alone(
    model: Model, request_: GenerationRequest
) -> None:
    engine = make_engine(model)
    engine.submit(greedy("before", prompt(60)))
    run_to_end(engine)
    engine.submit(request_)
    assert tokens_of(run_to_end(engine), request_.request_id) == alone(model, request_)


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("max_step_tokens", [7, 64])
def test_with_and_without_the_prefix_cache_answers_are_the_same(
    model: Model, max_step_tokens: int, prefix_cache: bool
) -> None:
    engine = make_engine(model, max_step_tokens=max_step_tokens, prefix_cache=prefix_cache)
    for each in ALL_SHARED:
        engine.submit(each)
    deltas = run_to_end(engine)
    assert (counters_of(engine).prefix_hit_tokens > 0) == prefix_cache
    assert {each.request_id: tokens_of(deltas, each.request_id) for each in ALL_SHARED} == {
        each.request_id: alone(model, each) for each in ALL_SHARED
    }


def test_the_first_delta_tells_how_many_prompt_tokens_were_found(model: Model) -> None:
    engine = make_engine(model)
    engine.submit(greedy("before", prompt(30)))
    assert [delta.cached_tokens for delta in run_to_end(engine)] == [0] * 12
    engine.submit(greedy("after", prompt(30), 3))
    assert [delta.cached_tokens for delta in run_to_end(engine)] == [28, 0, 0]


def test_prompt_tokens_that_were_found_are_not_counted_as_computed(model: Model) -> None:
    engine = make_engine(model)
    for name in "ab":
        engine.submit(greedy(name, prompt(30), 3))
        run_to_end(engine)
    assert engine.stats.prompt_tokens == 30 + 2

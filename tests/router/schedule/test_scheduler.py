"""The scheduler's promises, by example. Plain Python; `test_preemption.py` has its random traffic."""

import pytest

from router.errors import ResourceExhausted
from router.request import FinishReason
from router.schedule.scheduler import Scheduler
from tests.router.engines import (
    EOS,
    LIKE_SCOUT,
    STOP_TOKEN,
    WORD,
    FakeClock,
    make_scheduler,
    request,
    run_step,
    run_steps,
)


def test_an_idle_scheduler_has_nothing_to_do() -> None:
    scheduler = make_scheduler()
    assert scheduler.schedule() == []
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.kv_bytes_used) == (0, 0, 0)


def test_a_prompt_is_computed_at_once_and_then_token_after_token() -> None:
    scheduler = make_scheduler()
    scheduler.enqueue(request("a", 3, max_tokens=3))
    assert run_steps(scheduler) == [[("a", 0, 3)], [("a", 3, 1)], [("a", 4, 1)]]


def test_requests_start_in_the_order_of_their_arrival() -> None:
    scheduler = make_scheduler(max_running=2)
    for name in "abcd":
        scheduler.enqueue(request(name, 1, max_tokens=2))
    started = [[name for name, first, _ in step if first == 0] for step in run_steps(scheduler)]
    assert started == [["a", "b"], [], ["c", "d"], []]


# What goes into a step.


def test_decoding_goes_first_and_prompts_get_what_is_left_of_the_step() -> None:
    scheduler = make_scheduler(max_step_tokens=8)
    scheduler.enqueue(request("decoding", 2))
    run_step(scheduler)
    scheduler.enqueue(request("older", 10))
    scheduler.enqueue(request("younger", 9))
    assert run_step(scheduler) == [("decoding", 2, 1), ("older", 0, 7)]
    assert run_step(scheduler) == [("decoding", 3, 1), ("older", 7, 3), ("younger", 0, 4)]


def test_streams_get_their_token_in_every_step_however_many_prompts_come() -> None:
    scheduler = make_scheduler(max_step_tokens=8)
    scheduler.enqueue(request("decoding", 2, max_tokens=20))
    run_step(scheduler)
    for name in "abc":
        scheduler.enqueue(request(name, 30))
    assert all(run_step(scheduler)[0] == ("decoding", position, 1) for position in range(2, 12))


def test_only_the_last_piece_of_a_prompt_samples() -> None:
    scheduler = make_scheduler(max_step_tokens=4)
    scheduler.enqueue(request("a", 10))
    samples = []
    for _ in range(3):
        [work] = scheduler.schedule()
        samples.append(work.samples)
        scheduler.advance(work, WORD if work.samples else None, frozenset())
    assert samples == [False, False, True]


def test_a_piece_of_a_prompt_ends_where_an_attention_chunk_ends() -> None:
    scheduler = make_scheduler(layout=LIKE_SCOUT, max_step_tokens=6)
    scheduler.enqueue(request("a", 18, max_tokens=1))
    pieces = [(first, length) for [(_, first, length)] in run_steps(scheduler)]
    assert pieces == [(0, 6), (6, 2), (8, 6), (14, 2), (16, 2)]


def test_a_prompt_of_one_token_waits_behind_older_prompts() -> None:
    scheduler = make_scheduler(max_step_tokens=3)
    scheduler.enqueue(request("long", 9))
    scheduler.enqueue(request("short", 1))
    assert [run_step(scheduler) for _ in range(2)] == [[("long", 0, 3)], [("long", 3, 3)]]


def timed_step(scheduler: Scheduler, ms_per_token: float) -> list[tuple[str, int]]:
    """(request, tokens) of a step that takes so long for each of them."""
    works = scheduler.schedule()
    for work in works:
        scheduler.advance(work, WORD if work.samples else None, frozenset())
    scheduler.record_step(works, ms_per_token / 1000 * sum(work.length for work in works))
    return [(work.sequence.request.request_id, work.length) for work in works]


def test_long_prompts_beside_streams_are_paced_by_how_long_steps_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.schedule.scheduler.UNPACED_TOKENS", 0)
    monkeypatch.setattr("router.schedule.pace.FIRST_PROMPT_TOKENS", 59)
    scheduler = make_scheduler(max_step_tokens=60, prefill_slowdown=20.0)
    scheduler.enqueue(request("decoding", 2))
    timed_step(scheduler, ms_per_token=1.0)
    scheduler.enqueue(request("prompt", 300))
    steps = [timed_step(scheduler, ms_per_token=1.0) for _ in range(3)]
    assert steps == [
        [("decoding", 1)],  # how long does that take without prompts?
        [("decoding", 1), ("prompt", 59)],  # as many as fit into a step: too many, as is seen now
        [("decoding", 1), ("prompt", 5)],  # (the attention chunk ends here)
    ]


def test_only_what_a_prompt_has_beyond_its_beginning_is_paced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.schedule.scheduler.UNPACED_TOKENS", 64)
    scheduler = make_scheduler(max_step_tokens=65, prefill_slowdown=2.0)
    scheduler.enqueue(request("decoding", 2, max_tokens=40))
    timed_step(scheduler, ms_per_token=1.0)
    scheduler.enqueue(request("long", 300))
    steps = [timed_step(scheduler, ms_per_token=1.0) for _ in range(3)]
    scheduler.enqueue(request("short", 30))
    steps.append(timed_step(scheduler, ms_per_token=1.0))
    assert steps[:3] == [
        [("decoding", 1), ("long", 64)],  # its beginning
        [("decoding", 1)],  # how long does that take without prompts?
        [("decoding", 1), ("long", 64)],  # too many, as is seen now
    ]
    [_, (name, taken), short] = steps[3]
    assert (name, short) == ("long", ("short", 30))
    assert taken < 20


def test_a_short_prompt_does_not_wait_for_the_end_of_a_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor the long one for the last of many short ones."""
    monkeypatch.setattr("router.schedule.scheduler.UNPACED_TOKENS", 32)
    scheduler = make_scheduler(max_step_tokens=64, prefill_slowdown=2.0)
    scheduler.enqueue(request("long", 1000))
    assert timed_step(scheduler, ms_per_token=1.0) == [("long", 64)]
    for name in "abc":
        scheduler.enqueue(request(name, 24))
    assert timed_step(scheduler, ms_per_token=1.0) == [("long", 32), ("a", 24), ("b", 8)]


# Memory.


def test_memory_is_taken_as_tokens_are_computed() -> None:
    scheduler = make_scheduler(layout=LIKE_SCOUT)
    scheduler.enqueue(request("a", 5, max_tokens=6))
    units = [scheduler.kv_bytes_used // LIKE_SCOUT.unit_bytes]
    while scheduler.request_ids:
        run_step(scheduler)
        units.append(scheduler.kv_bytes_used // LIKE_SCOUT.unit_bytes)
    assert units == [0, 3 * 4, 3 * 4, 4 * 4, 4, 5 + 3, 0]  # after 0, 5, 6, 7, 8 and 9 tokens, and when it has gone


def test_a_request_starts_when_there_is_room_for_its_prompt() -> None:
    scheduler = make_scheduler(kv_units=7)
    scheduler.enqueue(request("first", 8, max_tokens=3))  # takes 4 of 7 blocks, and then 5
    scheduler.enqueue(request("second", 6, max_tokens=2))  # 4, with the first new token
    assert run_steps(scheduler)[2:] == [[("first", 9, 1)], [("second", 0, 6)], [("second", 6, 1)]]


def test_a_prompt_that_is_being_computed_keeps_the_room_for_its_rest() -> None:
    scheduler = make_scheduler(kv_units=8, max_step_tokens=2)
    scheduler.enqueue(request("first", 12, max_tokens=1))
    scheduler.enqueue(request("second", 4, max_tokens=1))
    run_step(scheduler)
    assert scheduler.num_running == 1
    assert scheduler.counters.preemptions == 0


def test_a_large_request_is_not_overtaken_by_smaller_ones() -> None:
    scheduler = make_scheduler(kv_units=10)
    scheduler.enqueue(request("first", 10, max_tokens=2))
    scheduler.enqueue(request("large", 18, max_tokens=1))
    scheduler.enqueue(request("small", 2, max_tokens=1))
    assert run_steps(scheduler) == [
        [("first", 0, 10)],  # there is room for `small`, which must not take it
        [("first", 10, 1)],
        [("large", 0, 18)],
        [("small", 0, 2)],
    ]


def test_a_request_that_fills_memory_exactly_is_served() -> None:
    scheduler = make_scheduler(kv_units=5)
    scheduler.enqueue(request("exact", 6, max_tokens=4))
    assert run_steps(scheduler)[-1] == [("exact", 8, 1)]


def test_a_request_that_can_never_fit_is_refused_by_name_of_the_limit() -> None:
    scheduler = make_scheduler(kv_units=5)
    with pytest.raises(
        ResourceExhausted, match=r"come to 11 tokens.* needs 60 bytes.* has 50 \(engine\.kv_bytes or engine\.kv_share\)"
    ):
        scheduler.enqueue(request("too large", 7, max_tokens=4))
    assert scheduler.request_ids == []


def test_it_makes_no_sense_to_try_what_can_never_fit_again() -> None:
    scheduler = make_scheduler(kv_units=5)
    with pytest.raises(ResourceExhausted) as refused:
        scheduler.enqueue(request("too large", 7, max_tokens=4))
    assert refused.value.retry_after_s is None


# The queue.


def fill(scheduler: Scheduler, max_tokens: int = 4) -> None:
    """One request runs, and as many wait as may."""
    scheduler.enqueue(request("running", max_tokens=max_tokens))
    run_step(scheduler)
    for nth in range(scheduler.limits.max_waiting):
        scheduler.enqueue(request(f"waiting {nth}", max_tokens=max_tokens))


def retry_hint(scheduler: Scheduler) -> float:
    with pytest.raises(ResourceExhausted) as refused:
        scheduler.enqueue(request("one too many"))
    assert refused.value.retry_after_s is not None
    return refused.value.retry_after_s


def test_a_full_queue_refuses_by_name_of_the_limit() -> None:
    scheduler = make_scheduler(max_running=1, max_waiting=2)
    fill(scheduler)
    with pytest.raises(
        ResourceExhausted, match=r"2 requests are waiting already \(engine\.max_waiting\); try again in"
    ):
        scheduler.enqueue(request("one too many"))
    assert scheduler.request_ids == ["running", "waiting 0", "waiting 1"]


def test_the_retry_hint_comes_to_be_the_time_between_ends() -> None:
    clock = FakeClock()
    scheduler = make_scheduler(max_running=1, max_waiting=1, clock=clock)
    fill(scheduler, max_tokens=1)
    for nth in range(80):
        clock.now_s += 0.05
        run_step(scheduler)
        scheduler.enqueue(request(f"another {nth}", max_tokens=1))
    assert retry_hint(scheduler) == pytest.approx(0.05, rel=0.1)


def test_the_retry_hint_grows_while_nothing_ends() -> None:
    clock = FakeClock()
    scheduler = make_scheduler(max_running=1, max_waiting=1, clock=clock)
    fill(scheduler)
    hints = []
    for _ in range(3):
        clock.now_s += 10.0
        hints.append(retry_hint(scheduler))
    assert hints == pytest.approx([10.0, 20.0, 30.0])


def test_the_retry_hint_does_not_count_the_time_in_which_nobody_asked() -> None:
    clock = FakeClock()
    scheduler = make_scheduler(max_running=1, max_waiting=1, clock=clock)
    clock.now_s += 3600.0
    fill(scheduler)
    clock.now_s += 5.0
    assert retry_hint(scheduler) == pytest.approx(5.0)


# How requests end.


@pytest.mark.parametrize(
    ("token_id", "reason"), [(EOS, FinishReason.STOP), (STOP_TOKEN, FinishReason.STOP), (WORD, None)]
)
def test_an_end_token_or_a_stop_token_of_the_request_stops_it(token_id: int, reason: FinishReason | None) -> None:
    scheduler = make_scheduler()
    scheduler.enqueue(request("a"))
    [work] = scheduler.schedule()
    assert scheduler.advance(work, token_id, frozenset({EOS})) is reason
    assert scheduler.num_running == (reason is None)


def test_the_last_allowed_token_ends_a_request_by_length() -> None:
    scheduler = make_scheduler()
    scheduler.enqueue(request("a", max_tokens=2))
    reasons = []
    for _ in range(2):
        [work] = scheduler.schedule()
        reasons.append(scheduler.advance(work, WORD, frozenset({EOS})))
    assert reasons == [None, FinishReason.LENGTH]


def test_an_end_token_in_the_last_place_counts_as_a_stop() -> None:
    scheduler = make_scheduler()
    scheduler.enqueue(request("a", max_tokens=1))
    [work] = scheduler.schedule()
    assert scheduler.advance(work, EOS, frozenset({EOS})) is FinishReason.STOP


def test_a_cancelled_waiting_request_never_starts() -> None:
    scheduler = make_scheduler(max_running=1)
    for name in "abc":
        scheduler.enqueue(request(name, max_tokens=1))
    assert scheduler.remove("b")
    assert run_steps(scheduler) == [[("a", 0, 3)], [("c", 0, 3)]]


def test_a_cancelled_running_request_frees_its_memory_and_its_place() -> None:
    scheduler = make_scheduler(max_running=1)
    for name in "ab":
        scheduler.enqueue(request(name))
    run_step(scheduler)
    assert scheduler.remove("a")
    assert scheduler.kv_bytes_used == 0
    assert run_step(scheduler) == [("b", 0, 3)]


def test_cancelling_an_unknown_or_finished_request_does_nothing() -> None:
    scheduler = make_scheduler()
    scheduler.enqueue(request("a", max_tokens=1))
    run_step(scheduler)
    assert not scheduler.remove("a")
    assert not scheduler.remove("never heard of")
    assert scheduler.kv_bytes_used == 0


def test_a_request_expires_when_its_client_stops_waiting_and_is_told_once() -> None:
    clock = FakeClock()
    scheduler = make_scheduler(max_running=1, clock=clock)
    scheduler.enqueue(request("patient", max_tokens=9, timeout_s=5.0))
    scheduler.enqueue(request("hasty, waiting", timeout_s=2.0))
    scheduler.enqueue(request("for ever"))
    expired = []
    for _ in range(7):
        run_step(scheduler)
        clock.now_s += 1.0
        expired.append(scheduler.expired())
    assert expired == [[], ["hasty, waiting"], [], [], ["patient"], [], []]


def test_a_request_that_has_ended_does_not_expire() -> None:
    clock = FakeClock()
    scheduler = make_scheduler(clock=clock)
    scheduler.enqueue(request("done", max_tokens=1, timeout_s=5.0))
    scheduler.enqueue(request("cancelled", timeout_s=5.0))
    run_step(scheduler)
    scheduler.remove("cancelled")
    clock.now_s += 10.0
    assert scheduler.expired() == []

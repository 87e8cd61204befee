"""Histograms, the lives of requests, and the clock of a step."""

import pickle
from itertools import pairwise

import pytest

from router.counts import step_clock
from router.counts.requests import (
    LENGTH_BOUNDS,
    REQUEST_BOUNDS_S,
    STEP_BOUNDS_S,
    WAIT_BOUNDS_S,
    Histogram,
    RequestMetrics,
)
from router.counts.step_clock import PHASES, Phase, StepClock
from router.request import FinishReason
from tests.router.engines import FakeClock


def test_a_value_falls_into_the_first_bucket_that_reaches_it() -> None:
    histogram = Histogram((1.0, 2.0, 5.0))
    for value in (0.5, 1.0, 1.5, 5.0, 7.0):
        histogram.observe(value)
    histogram.observe(2.0, times=3)
    assert histogram.counts == [2, 4, 1, 1]
    assert histogram.count == 8
    assert histogram.sum == pytest.approx(21.0)


@pytest.mark.parametrize("bounds", [STEP_BOUNDS_S, WAIT_BOUNDS_S, REQUEST_BOUNDS_S, LENGTH_BOUNDS])
def test_bounds_ascend(bounds: tuple[float, ...]) -> None:
    assert all(low < high for low, high in pairwise(bounds))


def test_one_request_from_arrival_to_end() -> None:
    metrics = RequestMetrics()
    metrics.arrived("a", 10.0, prompt_tokens=7)
    metrics.started(["a"], 12.0)
    metrics.started(["a"], 13.0)  # the second piece of its prompt
    metrics.made(["a"], 14.0)
    metrics.made(["a"], 14.5)
    metrics.made(["a"], 15.5)
    metrics.end("a", FinishReason.LENGTH.value, 15.5)
    sums = (metrics.queue_s.sum, metrics.first_token_s.sum, metrics.inter_token_s.sum, metrics.request_s.sum)
    assert sums == (2.0, 4.0, 1.5, 5.5)
    assert (metrics.queue_s.count, metrics.first_token_s.count, metrics.inter_token_s.count) == (1, 1, 2)
    assert (metrics.prompt_length.sum, metrics.generation_length.sum) == (7, 3)
    assert metrics.ended["length"] == 1


def test_tokens_of_one_step_may_have_waited_differently() -> None:
    metrics = RequestMetrics()
    for name in "abc":
        metrics.arrived(name, 0.0, prompt_tokens=1)
    metrics.made(["a", "b", "c"], 1.0)
    metrics.made(["a", "b"], 2.0)
    metrics.made(["a", "b", "c"], 3.0)  # c was preempted meanwhile
    assert metrics.inter_token_s.count == 5
    assert metrics.inter_token_s.sum == pytest.approx(1.0 + 1.0 + 1.0 + 1.0 + 2.0)


def test_an_end_counts_once() -> None:
    metrics = RequestMetrics()
    metrics.arrived("a", 0.0, prompt_tokens=1)
    metrics.end("a", "cancelled", 1.0)
    metrics.end("a", "cancelled", 2.0)
    metrics.end("never came", "cancelled", 2.0)
    metrics.refused()
    assert {ending: count for ending, count in metrics.ended.items() if count} == {"cancelled": 1, "refused": 1}
    assert (metrics.request_s.count, metrics.first_token_s.count) == (1, 0)


def test_every_finish_reason_is_counted() -> None:
    assert {reason.value for reason in FinishReason} <= set(RequestMetrics().ended)


def test_a_copy_stands_still_and_travels_light() -> None:
    metrics = RequestMetrics()
    metrics.arrived("a", 0.0, prompt_tokens=1)
    copied: RequestMetrics = pickle.loads(pickle.dumps(metrics.copy()))
    metrics.made(["a"], 1.0)
    metrics.end("a", "stop", 1.0)
    assert copied.ended["stop"] == copied.first_token_s.count == 0
    assert copied.prompt_length.count == 1
    assert not copied._live


def test_the_time_of_a_step_is_the_time_of_its_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    now = FakeClock()
    monkeypatch.setattr(step_clock, "perf_counter", now)
    clock = StepClock()
    clock.start()
    phases: tuple[Phase, ...] = ("attention", "dispatch", "expert_wait", "attention")
    for seconds, phase in enumerate(phases, 1):
        now.now_s += seconds
        clock.mark((phase, now()))
    now.now_s += 5.0
    assert clock.stop() == 15.0
    expected = {"schedule": 1.0, "attention": 2.0 + 5.0, "dispatch": 3.0, "expert_wait": 4.0}
    assert clock.seconds == dict.fromkeys(PHASES, 0.0) | expected


def test_a_step_that_had_nothing_to_do_takes_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = FakeClock()
    monkeypatch.setattr(step_clock, "perf_counter", now)
    clock = StepClock()
    clock.start()
    now.now_s += 5.0
    clock.start()
    now.now_s += 1.0
    assert clock.stop() == sum(clock.seconds.values()) == 1.0

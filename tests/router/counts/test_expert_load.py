"""Expert load in a few numbers, however many experts there are."""

import numpy as np
import pytest

from experts.placement import even_placement
from router.counts.expert_load import (
    HOTTEST,
    RATIO_BOUNDS,
    WINDOW_S,
    ExpertLoad,
    ExpertLoadSummary,
    balance,
    decayed,
    hottest,
    load_ratio,
)
from tests.router.engines import FakeClock

LAYERS, EXPERTS = (1, 3, 5), 128


def make_load(num_experts: int = EXPERTS) -> tuple[ExpertLoad, FakeClock]:
    clock = FakeClock()
    return ExpertLoad(even_placement(LAYERS, num_experts, 2), clock), clock


def summary_of(load: ExpertLoad) -> ExpertLoadSummary:
    summary = load.summary()
    assert summary is not None
    return summary


def count(load: ExpertLoad, layer: int, tokens_E: np.ndarray) -> None:
    load.count((layer, tokens_E))
    load.end_step()


def only(expert: int, tokens: int, num_experts: int = EXPERTS) -> np.ndarray:
    tokens_E = np.zeros(num_experts, dtype=np.int64)
    tokens_E[expert] = tokens
    return tokens_E


def test_without_traffic_there_is_nothing_to_tell() -> None:
    load, _ = make_load()
    assert load.summary() is None


def test_every_token_is_counted_for_its_layer_and_expert() -> None:
    load, _ = make_load()
    count(load, 3, only(17, 5))
    count(load, 3, only(17, 2))
    count(load, 5, only(0, 1))
    assert load.tokens_LE[1, 17] == 7
    assert load.tokens_LE[2, 0] == 1
    assert load.tokens_LE.sum() == 8


def test_totals_tell_rows_and_the_steps_that_had_any() -> None:
    load, _ = make_load()
    count(load, 3, only(17, 5))
    count(load, 3, only(17, 2))
    totals = load.totals()
    count(load, 3, only(17, 9))
    assert (totals.tokens_LE[1, 17], totals.reads_LE[1, 17]) == (7, 2)
    assert (totals.tokens_LE.sum(), totals.reads_LE.sum()) == (7, 2)
    assert load.totals().incarnation == totals.incarnation != make_load()[0].totals().incarnation


def test_what_a_step_has_counted_that_failed_is_dropped() -> None:
    load, _ = make_load()
    load.start_step()
    load.count((1, only(9, 100)))
    load.start_step()
    count(load, 3, only(17, 5))
    assert load.tokens_LE[1, 17] == load.tokens_LE.sum() == 5


def test_load_fades_with_time_whoever_looks_and_however_often() -> None:
    once, clock = make_load()
    count(once, 1, only(0, 1000))
    often, often_clock = make_load()
    count(often, 1, only(0, 1000))
    for _ in range(int(WINDOW_S)):
        often_clock.now_s += 1.0
        often.end_step()
    once.end_step()
    clock.now_s += WINDOW_S
    for load in (once, often):
        assert summary_of(load).hottest[0].recent_tokens == pytest.approx(1000 / np.e, rel=0.02)
    clock.now_s += 20 * WINDOW_S
    assert once.summary() is None


def test_at_a_steady_rate_the_window_holds_what_comes_in_a_window() -> None:
    load, clock = make_load()
    for _ in range(int(10 * WINDOW_S)):
        count(load, 1, only(9, 100))
        clock.now_s += 1.0
        load.end_step()
    assert summary_of(load).hottest[0].recent_tokens == pytest.approx(100 * WINDOW_S, rel=0.01)


def test_decay_by_hand() -> None:
    assert decayed(np.array([100.0, 0.0]), np.array([0, 7]), WINDOW_S).tolist() == pytest.approx([100 / np.e, 7.0])


def test_traffic_on_every_expert_tells_of_a_few() -> None:
    load, _ = make_load()
    for layer in LAYERS:
        count(load, layer, np.arange(1, EXPERTS + 1))
    summary = summary_of(load)
    assert len(summary.hottest) == HOTTEST
    # The last experts are the hottest, and equals of lower layers come first.
    assert [(hot.layer, hot.expert) for hot in summary.hottest[:4]] == [(1, 127), (3, 127), (5, 127), (1, 126)]
    assert len(summary.ratio_counts) == len(RATIO_BOUNDS) + 1
    assert sum(summary.ratio_counts) == len(LAYERS) * EXPERTS
    assert summary.ratio_sum == pytest.approx(len(LAYERS) * EXPERTS)  # the mean of ratios to the mean is 1


def test_who_is_shown_changes_once_in_a_window() -> None:
    """However wild the traffic: at most HOTTEST new time series a minute."""
    load, clock = make_load()
    shown: set[tuple[int, int]] = set()
    random = np.random.default_rng(0)
    windows = 5
    for _ in range(int(windows * WINDOW_S)):
        for layer in LAYERS:
            count(load, layer, random.permutation(EXPERTS) ** 3)
        clock.now_s += 1.0
        load.end_step()
        shown |= {(hot.layer, hot.expert) for hot in summary_of(load).hottest}
    assert len(shown) <= windows * HOTTEST


def test_who_is_shown_stays_while_nearly_as_hot() -> None:
    recent = np.array([5.0, 9.0, 8.0, 7.0])
    assert hottest(recent, (), 1) == (1,)
    assert hottest(recent, (2,), 1) == (2,)
    assert hottest(recent, (3,), 1) == (1,)
    assert hottest(recent, (3, 0), 2) == (3, 0)
    assert hottest(np.zeros(4), (3,), 2) == ()


def test_ratio_and_balance_by_hand() -> None:
    recent_LE = np.array([[3.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    assert load_ratio(recent_LE).tolist() == [[3.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    assert balance(recent_LE).tolist() == pytest.approx([1 / 3, 1.0])


def test_the_distribution_and_the_balance_are_those_of_the_traffic() -> None:
    load, _ = make_load(num_experts=4)
    count(load, 1, np.array([3, 1, 0, 0]))
    count(load, 3, np.array([2, 2, 2, 2]))
    summary = summary_of(load)
    counted = dict(zip([*RATIO_BOUNDS, None], summary.ratio_counts, strict=True))
    assert {bound: count for bound, count in counted.items() if count} == {0.0: 2, 1.0: 5, 3.0: 1}
    assert (summary.balance_worst, summary.balance_mean) == pytest.approx((1 / 3, 2 / 3))

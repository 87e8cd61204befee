"""From totals that routers count to windows of work per second."""

import doctest

import numpy as np
import pytest

from cluster.policy import load
from cluster.policy.load import Loads, LoadWindow
from router.counts.expert_totals import ExpertTotals
from router.model.replica_choice import ROWS_PER_EXPERT

LAYERS, EXPERTS = (1, 3), 4


def totals(rows: int, reads: int = 0, incarnation: str = "a") -> ExpertTotals:
    """The same of every expert."""
    tokens_LE = np.full((len(LAYERS), EXPERTS), rows, np.int64)
    return ExpertTotals(incarnation, tokens_LE, np.full_like(tokens_LE, reads))


def window(max_rows: int = 64) -> LoadWindow:
    return LoadWindow(LAYERS, EXPERTS, max_rows)


def loads_of(of: LoadWindow, now_s: float, over_s: float = 60.0) -> Loads:
    found = of.loads(now_s, over_s)
    assert found is not None
    return found


def test_the_documented_examples_hold() -> None:
    assert doctest.testmod(load).failed == 0


def test_the_first_sample_only_shows_where_the_counting_stands() -> None:
    of = window()
    assert not of.add(10.0, {"router-0": totals(1000)})
    assert of.loads(10.0, 60.0) is None
    assert of.age_s(10.0) is None


def test_rates_of_all_routers_add_up() -> None:
    of = window()
    of.add(10.0, {"router-0": totals(1000), "router-1": totals(0)})
    assert of.add(12.0, {"router-0": totals(1010), "router-1": totals(4)})
    assert loads_of(of, 12.0).mean_LE == pytest.approx(np.full((2, 4), 7.0))


def test_a_step_that_reads_an_expert_counts_as_some_rows() -> None:
    of = window()
    of.add(0.0, {"router-0": totals(0)})
    of.add(1.0, {"router-0": totals(5, reads=2)})
    assert loads_of(of, 1.0).mean_LE[0, 0] == 5 + 2 * ROWS_PER_EXPERT


def test_a_router_that_did_not_answer_is_measured_over_all_the_time_since() -> None:
    of = window()
    of.add(0.0, {"router-0": totals(0), "router-1": totals(0)})
    of.add(1.0, {"router-0": totals(10)})
    of.add(2.0, {"router-0": totals(20), "router-1": totals(10)})
    assert loads_of(of, 2.0).rows_WLE[:, 0, 0].tolist() == [10.0, 10.0 + 5.0]


def test_a_restarted_router_counts_from_nothing() -> None:
    of = window()
    of.add(0.0, {"router-0": totals(1_000_000)})
    of.add(2.0, {"router-0": totals(6, incarnation="b")})
    assert loads_of(of, 2.0).mean_LE[0, 0] == 3.0


def test_only_the_windows_asked_for_count() -> None:
    of = window(max_rows=3)
    for second in range(6):
        of.add(float(second), {"router-0": totals(second**2)})
    assert loads_of(of, 5.0, over_s=2.0).rows_WLE[:, 0, 0].tolist() == [7.0, 9.0]
    assert loads_of(of, 5.0).rows_WLE[:, 0, 0].tolist() == [5.0, 7.0, 9.0]
    assert of.loads(100.0, 60.0) is None
    assert of.age_s(100.0) == 95.0


def test_an_idle_deployment_has_no_load() -> None:
    of = window()
    of.add(0.0, {"router-0": totals(3)})
    assert of.add(1.0, {"router-0": totals(3)})
    assert of.loads(1.0, 60.0) is None

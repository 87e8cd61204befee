"""When requests come."""

from typing import Any

import numpy as np
import pytest

from cluster.simulation.scenario import TrafficSection
from cluster.simulation.traffic import arrivals, rate_at


def times(traffic: TrafficSection, duration_s: float = 1000.0) -> np.ndarray:
    return np.array([each.at_s for each in arrivals(traffic, duration_s, np.random.default_rng(1))])


def test_poisson_has_its_rate_and_random_gaps() -> None:
    gaps_s = np.diff(times(TrafficSection(requests_per_s=10)))
    assert gaps_s.mean() == pytest.approx(0.1, rel=0.05)
    assert gaps_s.std() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize(
    ("raw", "inside"),
    [
        ({"shape": "step", "from_s": 200.0, "until_s": 400.0}, lambda t: (t >= 200) & (t < 400)),
        ({"shape": "bursts", "period_s": 10.0, "burst_s": 2.0}, lambda t: t % 10 < 2),
    ],
)
def test_more_come_while_it_lasts(raw: dict[str, Any], inside: Any) -> None:
    traffic = TrafficSection(requests_per_s=10, factor=5, **raw)
    at_s = times(traffic)
    assert inside(at_s).sum() / 200 == pytest.approx(50, rel=0.05)
    assert (~inside(at_s)).sum() / 800 == pytest.approx(10, rel=0.05)


def test_a_day_swings_between_the_rate_and_its_multiple() -> None:
    day = TrafficSection(shape="diurnal", requests_per_s=2, factor=4, period_s=100)
    assert [rate_at(day, now_s) for now_s in (0, 25, 50, 100)] == pytest.approx([2, 5, 8, 2])


def test_a_factor_below_one_makes_them_fewer() -> None:
    traffic = TrafficSection(shape="step", requests_per_s=10, factor=0, from_s=100, until_s=200)
    at_s = times(traffic)
    assert ((at_s >= 100) & (at_s < 200)).sum() == 0


def test_nothing_comes_after_the_end() -> None:
    assert times(TrafficSection(ends_s=5.0), 10.0).max() < 5.0
    assert times(TrafficSection(), 10.0).max() < 10.0


def test_lengths_are_uniform_about_the_mean() -> None:
    traffic = TrafficSection(requests_per_s=50, prompt_tokens=100, output_tokens=1, spread=0.5)
    lengths = np.array([each.prompt_tokens for each in arrivals(traffic, 100, np.random.default_rng(0))])
    assert (lengths.min(), lengths.max()) == (50, 150)
    assert lengths.mean() == pytest.approx(100, rel=0.02)

"""Every rule of the scaler, on a simulated clock."""

import doctest
from collections.abc import Callable
from dataclasses import replace

import pytest

from cluster.policy import judgement
from cluster.policy.autoscale import Decision, Scaler, Signals
from cluster.policy.balance import Proposal
from cluster.policy.judgement import COPIES, Limits, ScaleSettings
from experts.placement import even_placement

SETTINGS = ScaleSettings(
    metrics_interval_s=1.0,
    look_back_period_s=10.0,
    stable_window_s=20.0,
    panic_window_s=4.0,
    upscale_delay_s=5.0,
    downscale_delay_s=30.0,
    cooldown_s=8.0,
    target_load=0.5,
    shards=Limits(1, 8),
    routers=Limits(1, 4),
    frontends=Limits(1, 2),
)
NOW = even_placement([0], 4, 2)
PAYS = Proposal(NOW, 1.5, 1.0, 100, 0.3, 5.0, 4, 6, True, "it pays")
DECLINED = replace(PAYS, is_accepted=False, reason="no change pays")
SHEDS = Proposal(NOW, 1.0, 1.0, 0, 0.0, 0.0, 6, 4, True, "some copies bring nothing")


class Simulation:
    """A deployment that does what is decided, sampled every second."""

    def __init__(self, settings: ScaleSettings = SETTINGS, start_s: float = 0.0, **counts: int) -> None:
        self.scaler, self.now_s = Scaler(settings), start_s
        self.counts = {"shards": 2, "routers": 1, "frontends": 1} | counts
        self.acted: list[Decision] = []
        self.last: dict[str, Decision] = {}
        self.asked: list[tuple[float, float]] = []
        self.proposal = DECLINED

    def propose(self, window_s: float, horizon_s: float) -> Proposal:
        self.asked.append((window_s, horizon_s))
        return self.proposal

    def run(self, seconds: int, signals: Callable[[], dict[str, object]] | None = None, **loads: float | None) -> None:
        """So many samples. loads: by kind; what is not named is at the target."""
        for _ in range(seconds):
            self.now_s += 1.0
            more = {} if signals is None else signals()
            full = dict.fromkeys(("shards", "routers", "frontends"), 0.5) | loads
            told = Signals(dict(self.counts), full, propose=self.propose, **more)  # type: ignore[arg-type]
            for decision in self.scaler.decide(self.now_s, told):
                self.last[decision.kind] = decision
                if decision.acts:
                    self.acted.append(decision)
                    if decision.kind != COPIES:
                        self.counts[decision.kind] = decision.target

    def steps(self, kind: str) -> list[tuple[str, int]]:
        return [(decision.decision, decision.target) for decision in self.acted if decision.kind == kind]


def test_the_documented_examples_hold() -> None:
    assert doctest.testmod(judgement).failed == 0


def test_at_the_target_nothing_changes() -> None:
    simulation = Simulation()
    simulation.run(200)
    assert simulation.acted == []


def test_more_parts_after_the_upscale_delay_and_not_before() -> None:
    simulation = Simulation()
    simulation.run(5, shards=0.9)
    assert simulation.acted == []
    assert "2 -> 4" in simulation.last["shards"].reason
    simulation.run(1, shards=0.9)
    assert simulation.steps("shards") == [("up", 4)]


def test_a_load_that_falls_again_starts_the_delay_anew() -> None:
    simulation = Simulation()
    simulation.run(4, shards=0.6)
    simulation.run(20, shards=0.3)
    simulation.run(2, shards=0.9)
    assert simulation.steps("shards") == []


def test_fewer_parts_only_after_the_downscale_delay() -> None:
    simulation = Simulation(shards=4)
    simulation.run(30, shards=0.2)
    assert simulation.acted == []
    simulation.run(1, shards=0.2)
    assert simulation.steps("shards") == [("down", 2)]


def test_fewer_parts_only_after_a_full_stable_window() -> None:
    simulation = Simulation(replace(SETTINGS, downscale_delay_s=0.0), shards=4)
    simulation.run(20, shards=0.2)
    assert simulation.acted == []
    simulation.run(1, shards=0.2)
    assert simulation.steps("shards") == [("down", 2)]


def test_a_panic_needs_no_delay() -> None:
    simulation = Simulation(replace(SETTINGS, upscale_delay_s=1000.0))
    simulation.run(30, shards=0.5)
    simulation.run(4, shards=1.2)
    assert simulation.steps("shards") == [("up", 5)]
    assert simulation.acted[0].reason.startswith("panic")


def test_nothing_becomes_less_in_a_panic() -> None:
    settings = replace(SETTINGS, downscale_delay_s=0.0)
    simulation = Simulation(settings, shards=8)  # as many as there may be
    simulation.run(30, shards=0.5)
    simulation.run(4, shards=1.5)
    simulation.run(20, shards=0.0)
    assert simulation.acted == []
    simulation.run(10, shards=0.0)
    assert simulation.steps("shards")[0][0] == "down"
    panicked_s = 30.0 + 4.0
    assert simulation.acted[0].time_s >= panicked_s + settings.stable_window_s


def test_stale_loads_hold() -> None:
    simulation = Simulation()
    simulation.run(4, shards=0.9)
    simulation.run(30, shards=None)
    assert simulation.steps("shards") == []
    assert "no load was measured" in simulation.last["shards"].reason
    simulation = Simulation()
    simulation.run(4, shards=0.9)
    simulation.run(12, shards=None)
    assert "12 s ago, which is more than 10 s" in simulation.last["shards"].reason


def test_one_change_at_a_time() -> None:
    simulation = Simulation()
    simulation.run(6, shards=0.9, routers=0.9)
    assert [decision.kind for decision in simulation.acted] == ["shards"]
    assert simulation.last["routers"].reason == "waits for shards: up"
    simulation.run(1, shards=0.9, routers=0.9)
    assert [decision.kind for decision in simulation.acted] == ["shards", "routers"]


def test_what_is_in_flight_holds_everything() -> None:
    simulation = Simulation()
    simulation.run(30, lambda: {"in_flight": "resize abc"}, shards=0.9)
    assert simulation.acted == []
    assert simulation.last["shards"].reason == "waits for resize abc"


def test_after_a_change_the_same_kind_cools_down() -> None:
    simulation = Simulation(replace(SETTINGS, upscale_delay_s=0.0))
    simulation.run(20, shards=0.9)
    first, second = (decision.time_s for decision in simulation.acted[:2])
    assert second - first == 8.0


def test_limits_hold_and_are_made_true() -> None:
    simulation = Simulation(shards=2)
    simulation.run(60, shards=5.0)
    assert simulation.counts["shards"] == 8
    simulation = Simulation(replace(SETTINGS, shards=Limits(3, 5)), shards=2)
    simulation.run(1)
    assert simulation.steps("shards") == [("up", 3)]
    simulation = Simulation(replace(SETTINGS, shards=Limits(1, 2)), shards=4)
    simulation.run(1)
    assert simulation.steps("shards") == [("down", 2)]


def test_factors_make_a_part_of_the_change() -> None:
    simulation = Simulation(replace(SETTINGS, upscaling_factor=0.5))
    simulation.run(6, shards=0.9)
    assert simulation.steps("shards") == [("up", 3)]


def test_paused_decides_nothing() -> None:
    simulation = Simulation(replace(SETTINGS, paused=True))
    simulation.run(60, shards=2.0)
    assert simulation.acted == []
    assert simulation.last["shards"].reason == "paused"


def test_a_dry_run_decides_and_does_not_act() -> None:
    simulation = Simulation(replace(SETTINGS, dry_run=True))
    simulation.run(6, shards=0.9)
    assert simulation.acted == []
    assert (simulation.last["shards"].decision, simulation.last["shards"].target) == ("up", 4)


def unequal(stable: float | None, panic: float | None = None, extra: int = 0) -> Callable[[], dict[str, object]]:
    age_s = None if stable is None else 0.0
    told = {"imbalance_stable": stable, "imbalance_panic": panic, "load_age_s": age_s, "extra_copies": extra}
    return lambda: told


def test_copies_change_when_the_stable_window_has_asked_long_enough() -> None:
    simulation = Simulation()
    simulation.proposal = PAYS
    simulation.run(5, unequal(1.3, 1.3))
    assert simulation.asked == []
    simulation.run(1, unequal(1.3, 1.3))
    assert simulation.asked == [(20.0, 300.0)]
    assert simulation.steps(COPIES) == [("rebalance", 2)]
    assert simulation.acted[0].proposal is PAYS


def test_in_a_panic_copies_change_at_once_for_the_load_of_the_panic() -> None:
    simulation = Simulation()
    simulation.proposal = PAYS
    simulation.run(30, unequal(1.05, 1.15))
    assert simulation.asked == []
    simulation.run(1, unequal(1.08, 1.3))
    assert simulation.asked == [(4.0, 20.0)]
    assert simulation.steps(COPIES) == [("rebalance", 2)]


def test_a_panic_without_load_waits() -> None:
    simulation = Simulation()
    simulation.run(5, unequal(1.0, 1.5))
    asked = len(simulation.asked)
    simulation.run(10, unequal(1.2, None))
    assert len(simulation.asked) == asked
    assert simulation.last[COPIES].reason == "panic, and nothing is computed"


def test_an_imbalance_that_lasts_is_no_panic() -> None:
    simulation = Simulation(replace(SETTINGS, upscale_delay_s=1000.0))
    simulation.proposal = PAYS
    simulation.run(60, unequal(1.5, 1.6))
    assert simulation.acted == []


def test_what_was_declined_is_not_proposed_again_at_once() -> None:
    simulation = Simulation()
    simulation.run(6, unequal(1.3, 1.3))
    assert simulation.last[COPIES].reason == "no change pays"
    simulation.run(3, unequal(1.3, 1.3))
    assert len(simulation.asked) == 1
    simulation.run(1, unequal(1.3, 1.3))
    assert len(simulation.asked) == 2


def test_copies_are_given_back_after_the_downscale_delay() -> None:
    simulation = Simulation()
    simulation.proposal = SHEDS
    simulation.run(30, unequal(1.0, 1.0, extra=2))
    assert simulation.acted == []
    simulation.run(1, unequal(1.0, 1.0, extra=2))
    assert simulation.steps(COPIES) == [("shed", 0)]


def test_copies_are_not_given_back_in_a_panic() -> None:
    simulation = Simulation(replace(SETTINGS, downscale_delay_s=0.0))
    simulation.proposal = SHEDS
    simulation.run(15, unequal(1.0, 1.0, extra=2))
    simulation.run(1, unequal(1.0, 1.5, extra=2))
    simulation.run(19, unequal(1.0, 1.0, extra=2))
    assert simulation.acted == []
    simulation.run(10, unequal(1.0, 1.0, extra=2))
    assert simulation.steps(COPIES)[0] == ("shed", 0)


@pytest.mark.parametrize("start_s", [0.0, -1.0, 1e9])
def test_the_clock_may_begin_anywhere(start_s: float) -> None:
    simulation = Simulation(start_s=start_s)
    simulation.run(6, shards=0.9)
    assert simulation.steps("shards") == [("up", 4)]

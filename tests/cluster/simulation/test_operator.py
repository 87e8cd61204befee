"""The real policies on a simulated deployment: copies appear where load is, and nothing is lost meanwhile."""

import json
from functools import cache
from typing import Any

import pytest

from cluster.policy.decisions import from_line, replay
from cluster.simulation.recorder import holders
from cluster.simulation.scenario import parse_scenario
from cluster.simulation.simulation import Simulation

# A quarter of a minute stands for a minute, so that a test is short.
WINDOWS = {
    "metrics_interval_s": 0.5, "look_back_period_s": 10, "stable_window_s": 10, "panic_window_s": 2,
    "upscale_delay_s": 4, "downscale_delay_s": 6, "cooldown_s": 4,
}  # fmt: skip
FROM_S, UNTIL_S = 12.0, 24.0
STEP = [{"experts": 4, "share": 0.6, "from_s": FROM_S, "until_s": UNTIL_S}]
# Slow enough for few steps per second: that many are as good as more.
COSTS = {"router": {"step_us": 15_000}, "shard": {"row_us": 1000, "load_mb_s": 100}, "jitter": 0}
RAW: dict[str, Any] = {
    "duration_s": 44.0,
    "model": {"moe_layers": 2, "experts": 32, "expert_bytes": 1_000_000},
    "shards": {"count": 4, "slots": 12},
    "traffic": {"shape": "closed", "streams": 24, "prompt_tokens": 8, "output_tokens": 60},
    "routing": {"source": "uniform", "hot": STEP},
    "autoscale": WINDOWS,
    "costs": COSTS,
}


@cache
def simulated(is_paused: bool = False) -> tuple[Simulation, dict[str, Any]]:
    simulation = Simulation(parse_scenario(RAW | {"autoscale": WINDOWS | {"paused": is_paused}}))
    return simulation, simulation.run()


def mean(result: dict[str, Any], name: str, from_s: float, until_s: float) -> float:
    values = [row[name] for row in result["series"] if from_s < row["time_s"] <= until_s]
    return sum(values) / len(values)


def acted(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in result["decisions"] if row["decision"] != "hold"]


def test_four_hot_experts_get_copies_within_the_windows_and_balance_recovers() -> None:
    _, result = simulated()
    first = next(row for row in acted(result) if row["time_s"] > FROM_S)
    assert (first["kind"], first["decision"]) == ("copies", "rebalance")
    assert first["time_s"] < FROM_S + WINDOWS["panic_window_s"] + 2 * WINDOWS["metrics_interval_s"]
    copied_s = next(row["time_s"] for row in result["series"] if row["time_s"] > FROM_S and row["copies"] > 1.0)
    assert copied_s < FROM_S + 10
    _, without = simulated(is_paused=True)
    settled = (FROM_S + 8, UNTIL_S)
    assert mean(without, "imbalance", *settled) > 1.8
    assert mean(result, "imbalance", *settled) < 1.45
    assert mean(result, "tok_s", *settled) > 1.15 * mean(without, "tok_s", *settled)
    assert mean(result, "gap_ms_p99", *settled) < mean(without, "gap_ms_p99", *settled)


def test_balance_is_as_before_once_the_load_is() -> None:
    _, result = simulated()
    assert mean(result, "imbalance", 40, 44) < mean(result, "imbalance", 4, 12) + 0.1


def test_what_was_moved_is_counted_and_slots_are_never_exceeded() -> None:
    simulation, result = simulated()
    size = RAW["model"]["expert_bytes"]
    assert result["summary"]["moved_bytes"] % size == 0
    assert (
        0 < result["summary"]["moved_bytes"] <= sum(row["inputs"]["proposal"]["moved_bytes"] for row in acted(result))
    )
    for shard in simulation.changes.shards.values():
        for layer in range(RAW["model"]["moe_layers"]):
            assert sum(held == layer for held, _ in shard.held) <= RAW["shards"]["slots"]
    assert simulation.changes.state.is_settled
    for number, shard in simulation.changes.shards.items():
        assert shard.held == simulation.placement.slots_of(number)


def test_paused_it_changes_nothing() -> None:
    simulation, result = simulated(is_paused=True)
    assert (acted(result), result["summary"]["moved_bytes"]) == ([], 0)
    assert simulation.placement.epoch == 1


def test_the_decisions_can_be_made_again_from_their_rows() -> None:
    _, result = simulated()
    rows = [from_line(json.dumps(row)) for row in result["decisions"]]
    assert rows
    assert replay(rows) == rows


@pytest.mark.parametrize("at_s", [13.5, 14.2, 15.0, 15.6])
def test_a_shard_that_dies_amid_a_change_delays_it_only(at_s: float) -> None:
    raw = RAW | {"duration_s": 26.0, "faults": [{"shard": 1, "at_s": at_s}]}
    raw["costs"] = COSTS | {"shard": COSTS["shard"] | {"load_mb_s": 10, "restart_s": 1}}
    simulation = Simulation(parse_scenario(raw))
    result = simulation.run()
    assert acted(result)
    assert result["summary"]["refused"] == 0
    assert simulation.changes.living == {0, 1, 2, 3}
    assert holders(simulation.placement) == [0, 1, 2, 3]
    assert simulation.placement.epoch > 1
    assert result["summary"]["under_way"] == RAW["traffic"]["streams"]


def test_shards_come_with_the_load_and_go_after_it() -> None:
    traffic = {"shape": "step", "requests_per_s": 3, "factor": 4, "from_s": 5, "until_s": 20, "prompt_tokens": 8}
    raw = RAW | {
        "duration_s": 70.0,
        "shards": {"count": 2, "slots": 24},
        "routing": {"source": "uniform"},
        "traffic": traffic | {"output_tokens": 60},
        "autoscale": WINDOWS | {"target_load": 0.5, "shards": {"min": 2, "max": 5}},
        "costs": {"router": {"step_us": 5000}, "shard": {"row_us": 3000, "load_mb_s": 100, "start_s": 1}, "jitter": 0},
    }
    simulation = Simulation(parse_scenario(raw))
    result = simulation.run()
    assert {row["decision"] for row in acted(result) if row["kind"] == "shards"} == {"up", "down"}
    counts = [row["shards"] for row in result["series"]]
    most_s = counts.index(max(counts))
    assert (counts[0], min(counts[most_s:])) == (2, 2)
    assert max(counts) > 2
    assert result["summary"]["requests"] == result["summary"]["finished"] + result["summary"]["under_way"]
    assert {0, 1} <= set(holders(simulation.placement)) <= set(simulation.changes.shards)


def test_routers_come_with_the_load_and_those_that_leave_finish_their_requests() -> None:
    traffic = {"shape": "step", "requests_per_s": 3, "factor": 5, "from_s": 5, "until_s": 20, "prompt_tokens": 8}
    raw = RAW | {
        "duration_s": 80.0,
        "routing": {"source": "uniform"},
        "traffic": traffic | {"output_tokens": 30, "ends_s": 75},
        "engine": {"max_running": 8, "max_step_tokens": 64},
        "autoscale": WINDOWS | {"panic_threshold": 50, "routers": {"min": 1, "max": 4}},
        "costs": {"router": {"step_us": 40_000}, "shard": {"start_s": 1}, "jitter": 0},
    }
    result = Simulation(parse_scenario(raw)).run()
    counts = [row["routers"] for row in result["series"]]
    assert max(counts) > 1
    assert counts[-1] < max(counts)
    assert result["summary"]["requests"] == result["summary"]["finished"]

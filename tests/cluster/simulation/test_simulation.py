"""A simulated deployment: nothing is lost, the same again is the same, and times are what the formulas say."""

from typing import Any

import pytest

from cluster.simulation.scenario import parse_scenario
from cluster.simulation.simulation import Simulation

# Whole microseconds, and no randomness beside the traffic's.
COSTS: dict[str, Any] = {
    "router": {
        "step_us": 1000, "token_us": 10, "layer_us": 200, "layer_token_us": 5, "context_us": 0, "message_us": 30,
    },
    "shard": {"message_us": 100, "read_gb_s": 1, "row_us": 7},
    "link": {"latency_us": 60, "gb_s": 1},
    "jitter": 0,
}  # fmt: skip
MODEL = {"moe_layers": 2, "experts": 8, "expert_bytes": 500_000, "row_bytes": 1000}
ONE_HOT = [{"experts": 1, "share": 1.0, "from_s": 0, "until_s": 1000}]
ONE_TOKEN = {"shape": "closed", "streams": 1, "prompt_tokens": 1, "output_tokens": 50, "spread": 0}


def simulated(**raw: Any) -> tuple[Simulation, dict[str, Any]]:
    raw = {"duration_s": 3.0, "costs": COSTS, "model": MODEL, "shards": {"count": 2}} | raw
    simulation = Simulation(parse_scenario(raw))
    return simulation, simulation.run()


@pytest.mark.parametrize("routers", [1, 3])
@pytest.mark.parametrize("shape", ["poisson", "bursts", "diurnal", "step", "closed"])
def test_every_request_finishes_and_every_token_leaves(shape: str, routers: int) -> None:
    traffic = {
        "shape": shape, "ends_s": 1.0, "requests_per_s": 20, "streams": 6, "output_tokens": 20, "from_s": 0.5,
        "period_s": 1.0, "burst_s": 0.3,
    }  # fmt: skip
    simulation, result = simulated(duration_s=8.0, traffic=traffic, routers=routers)
    summary = result["summary"]
    assert summary["requests"] > 5
    assert (summary["finished"], summary["refused"], summary["under_way"]) == (summary["requests"], 0, 0)
    # Every token but a request's last is computed once in each layer, by one expert.
    computed = sum(int(router.tokens_LE.sum()) for router in simulation.routers)
    assert computed == simulation.recorder.rows_computed
    assert computed % MODEL["moe_layers"] == 0
    assert computed // MODEL["moe_layers"] >= summary["tokens"]
    assert sum(row["tok_s"] for row in result["series"]) == pytest.approx(summary["tokens"])


def test_the_same_seed_gives_the_same_result_and_another_one_does_not() -> None:
    results = [simulated(seed=seed, routing={"source": "trace"}, model={}, costs={})[1] for seed in (1, 1, 2)]
    assert results[0] == results[1]
    assert results[0]["series"] != results[2]["series"]


def step_s(tokens: int, messages: int, shard_s: float, rows: int) -> float:
    """One step of COSTS and MODEL, by hand. shard_s: of the last shard to answer in a layer, with `rows` rows."""
    layer_s = 200e-6 + 5e-6 * tokens + 30e-6 * messages + 60e-6 + 2 * rows * 1e-6 + shard_s
    return 1000e-6 + 10e-6 * tokens + 2 * layer_s


@pytest.mark.parametrize("routers", [1, 2])
def test_one_stream_takes_what_the_formula_says(routers: int) -> None:
    """Also layer by layer, as with several routers, of which one has something to do."""
    _, result = simulated(traffic=ONE_TOKEN, routers=routers)
    alone_s = step_s(1, 1, 100e-6 + 500e-6 + 7e-6, 1)
    assert result["summary"]["gap_ms_p50"] == pytest.approx(1e3 * alone_s)
    assert result["summary"]["gap_ms_p99"] == pytest.approx(1e3 * alone_s)


def test_one_hot_expert_is_read_once_for_all_streams() -> None:
    _, result = simulated(traffic=ONE_TOKEN | {"streams": 10, "output_tokens": 1000}, routing={"hot": ONE_HOT})
    assert result["summary"]["gap_ms_p50"] == pytest.approx(1e3 * step_s(10, 1, 100e-6 + 500e-6 + 70e-6, 10))
    assert result["summary"]["imbalance"] == pytest.approx(2.0)  # one of two shards has all


def test_shards_of_one_node_share_its_processors() -> None:
    """All 8 experts of a layer are active, 4 on each shard: together they take twice as long on half of the node."""
    streams = {"streams": 64, "output_tokens": 1000}
    half = {"count": 2, "per_node": 2, "parallel": 1}
    raw = {"routing": {"source": "uniform"}, "traffic": ONE_TOKEN | streams, "model": MODEL | {"row_bytes": 1}}
    apart, together = (simulated(shards=shards, **raw)[1]["summary"] for shards in ({"count": 2}, half))
    costs = COSTS | {"shard": COSTS["shard"] | {"row_us": 0}}
    exact = simulated(shards=half, costs=costs, **raw)[1]["summary"]
    assert together["gap_ms_p50"] > apart["gap_ms_p50"] + 2 * 1.9
    assert exact["gap_ms_p50"] == pytest.approx(1e3 * step_s(64, 2, 2 * (100e-6 + 4 * 500e-6), 0), rel=1e-3)


def test_several_routers_wait_for_each_other_at_the_shards() -> None:
    busy = COSTS | {"shard": {"message_us": 5000, "read_gb_s": 1, "row_us": 0}}
    raw = {"routing": {"hot": ONE_HOT}, "costs": busy, "traffic": ONE_TOKEN | {"streams": 4, "output_tokens": 500}}
    alone, four = (simulated(routers=routers, **raw)[1]["summary"] for routers in (1, 4))
    # 4 routers with a stream each: the shard of each layer's hot expert is the bottleneck, 5.5 ms for each message.
    assert four["tok_s"] == pytest.approx(1 / 5.5e-3, rel=0.05)
    assert alone["tok_s"] > 1.5 * four["tok_s"]


def test_a_dense_model_has_no_shards() -> None:
    _, result = simulated(model={"moe_layers": 0}, traffic=ONE_TOKEN)
    assert result["summary"]["gap_ms_p50"] == pytest.approx(1.01)
    assert (result["summary"]["shards"], result["summary"]["imbalance"]) == (0, None)


def test_one_shard_has_all_the_work() -> None:
    _, result = simulated(shards={"count": 1})
    assert result["summary"]["imbalance"] == pytest.approx(1.0)
    assert result["summary"]["finished"] > 0


def test_without_a_replica_streams_wait_for_the_restarted_shard() -> None:
    costs = COSTS | {"shard": COSTS["shard"] | {"restart_s": 1.0, "load_mb_s": 100}}
    raw = {"faults": [{"shard": 0, "at_s": 1.0}], "routing": {"hot": ONE_HOT}, "traffic": ONE_TOKEN | {"streams": 4}}
    _, result = simulated(costs=costs, **raw)
    loading_s = 2 * 4 * 500_000 / 100e6
    assert result["summary"]["gap_ms_max"] == pytest.approx(1e3 * (1.0 + loading_s), rel=0.05)
    assert result["summary"]["refused"] == 0
    _, with_replicas = simulated(costs=costs, shards={"count": 2, "replicas": 2}, **raw)
    assert 20 < with_replicas["summary"]["gap_ms_max"] < 30  # costs.link.lost_ms, and the step


def test_a_full_queue_refuses() -> None:
    engine = {"max_running": 1, "max_waiting": 1, "max_step_tokens": 64}
    traffic = {"requests_per_s": 100, "output_tokens": 500, "spread": 0}
    _, result = simulated(engine=engine, traffic=traffic, duration_s=1.0)
    summary = result["summary"]
    assert summary["refused"] == summary["requests"] - 2

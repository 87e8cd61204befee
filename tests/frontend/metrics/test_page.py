"""The page for Prometheus: it parses, it teaches, and it does not grow."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from experts.placement import even_placement
from frontend.metrics.catalogue import COUNTERS, EXPERT_LOAD_RATIO, GAUGES, HISTOGRAMS, ROWS_COMPUTED, UP, RouterReport
from frontend.metrics.page import ShardReport, render
from router.counts.expert_load import HOTTEST, RATIO_BOUNDS, ExpertLoad, ExpertLoadSummary
from router.counts.requests import STEP_BOUNDS_S, EngineSnapshot, EngineStats, Histogram, RequestMetrics
from router.counts.step_clock import PHASES

SHARDS = ("shard-0", "shard-1")
STATS = EngineStats(
    prompt_tokens=100,
    generated_tokens=40,
    steps=30,
    running=3,
    waiting=2,
    kv_bytes_used=250,
    kv_bytes_cached=150,
    kv_bytes_total=1000,
    prefix_queried_tokens=80,
    prefix_hit_tokens=20,
    preemptions=1,
    replayed=4,
)


def snapshot(expert_load: ExpertLoadSummary | None = None) -> EngineSnapshot:
    requests = RequestMetrics()
    requests.arrived("a", 0.0, prompt_tokens=9, replayed="silent")
    requests.made(["a"], 0.3)
    requests.made(["a"], 0.302)
    requests.end("a", "stop", 0.302)
    step_s = Histogram(STEP_BOUNDS_S)
    step_s.observe(0.004)
    return EngineSnapshot(
        STATS, requests, step_s, dict.fromkeys(PHASES, 1.5), {0: 70, 1: 60}, {"late": 4}, {1: 9.5}, expert_load
    )


def load_of(layers: int, experts: int) -> ExpertLoadSummary:
    """After traffic that hits every expert of every layer, each differently."""
    load = ExpertLoad(even_placement(range(layers), experts, 2))
    for layer in range(layers):
        load.count((layer, np.arange(1, experts + 1) * (layer + 1)))
    load.end_step()
    summary = load.summary()
    assert summary is not None
    return summary


def page(of: EngineSnapshot | None, *shards: ShardReport, down: frozenset[str] = frozenset()) -> str:
    report = RouterReport(
        "router-0", of, dict(enumerate(SHARDS)), down, losses={"silent": 2}, missing_experts=6, is_degraded=True
    )
    return render("tiny", [report], shards).decode()


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(name, labels but those of every sample) -> value; each line once."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels.pop("model_name") == "tiny"
            sample.labels.pop("router", None)
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found
            found[key] = sample.value
    return found


def test_every_number_is_told_under_its_name() -> None:
    told = samples(page(snapshot()))
    for name, value in {
        "num_requests_running": 3,
        "num_requests_waiting": 2,
        "kv_cache_usage_perc": 0.25,
        "prompt_tokens_total": 100,
        "generation_tokens_total": 40,
        "num_preemptions_total": 1,
        "missing_experts": 6,
        "degraded": 1,
        "prefix_cache_queries_total": 80,
        "prefix_cache_hits_total": 20,
        "time_to_first_token_seconds_count": 1,
        "time_to_first_token_seconds_sum": 0.3,
        "inter_token_latency_seconds_count": 1,
        "e2e_request_latency_seconds_sum": 0.302,
        "request_queue_time_seconds_count": 0,
        "request_generation_tokens_sum": 2,
        "step_seconds_count": 1,
    }.items():
        assert told[f"drover_{name}", ()] == pytest.approx(value), name
    for name, label, value in (
        ("kv_cache_bytes", ("state", "used"), 250),
        ("kv_cache_bytes", ("state", "cached"), 150),
        ("kv_cache_bytes", ("state", "free"), 600),
        ("request_success_total", ("finished_reason", "stop"), 1),
        ("request_success_total", ("finished_reason", "error"), 0),
        ("requests_replayed_total", ("reason", "silent"), 1),
        ("requests_replayed_total", ("reason", "lost"), 0),
        ("step_phase_seconds_total", ("phase", "expert_wait"), 1.5),
        ("shard_rows_total", ("shard", "shard-1"), 60),
        ("shard_linked", ("shard", "shard-1"), 1),
        ("shard_slowness", ("shard", "shard-1"), 9.5),
        ("dispatch_retries_total", ("reason", "late"), 4),
        ("shard_down_total", ("reason", "silent"), 2),
        ("step_seconds_bucket", ("le", "0.003"), 0),
        ("step_seconds_bucket", ("le", "0.005"), 1),
        ("step_seconds_bucket", ("le", "+Inf"), 1),
        ("request_prompt_tokens_bucket", ("le", "1.048576e+06"), 1),
    ):
        assert told[f"drover_{name}", (label,)] == value, (name, label)


def test_expert_load_is_a_few_names_and_a_distribution() -> None:
    told = samples(page(snapshot(load_of(layers=1, experts=4))))
    tokens = {dict(labels)["expert"]: n for (name, labels), n in told.items() if name == "drover_expert_load_tokens"}
    assert tokens == pytest.approx({"3": 4, "2": 3, "1": 2, "0": 1}, rel=0.01)
    assert told["drover_expert_balancedness", (("layers", "worst"),)] == pytest.approx(2.5 / 4)
    ratio = {le: told["drover_expert_load_ratio_bucket", (("le", le),)] for le in ("0.5", "1.0", "2.0", "+Inf")}
    assert ratio == {"0.5": 1, "1.0": 2, "2.0": 4, "+Inf": 4}


def test_the_number_of_series_does_not_grow_with_the_experts() -> None:
    few, many = (samples(page(snapshot(load_of(layers, 128)))) for layers in (2, 48))
    assert len(few) == len(many) < 250
    of_experts = [name for name, _ in many if "_expert_" in name and "step" not in name]
    assert len(of_experts) <= HOTTEST + 2 + len(RATIO_BOUNDS) + 1 + 2


def test_a_router_that_is_away_is_told_as_such() -> None:
    text = page(None, ShardReport("shard-0", 7), ShardReport("shard-1", None))
    assert samples(text) == {
        ("drover_up", (("part", "router-0"),)): 0,
        ("drover_up", (("part", "shard-0"),)): 1,
        ("drover_up", (("part", "shard-1"),)): 0,
        ("drover_shard_rows_computed_total", (("shard", "shard-0"),)): 7,
    }


def test_a_broken_link_is_told() -> None:
    told = samples(page(snapshot(), down=frozenset({"shard-1"})))
    assert [told["drover_shard_linked", (("shard", name),)] for name in SHARDS] == [1, 0]


def test_before_any_traffic_the_page_is_whole() -> None:
    idle = replace(snapshot(), stats=EngineStats(*[0] * 12), requests=RequestMetrics(), step_s=Histogram(STEP_BOUNDS_S))
    assert not [key for key, value in samples(page(idle)).items() if math.isnan(value)]


def catalogue() -> list[tuple[str, str]]:
    own = [(metric.name, metric.help) for metric in (*GAUGES, *HISTOGRAMS)]
    return [
        *own,
        *((m.name + "_total", m.help) for m in COUNTERS),
        EXPERT_LOAD_RATIO,
        UP,
        (f"{ROWS_COMPUTED[0]}_total", ROWS_COMPUTED[1]),
    ]


@pytest.mark.parametrize(("name", "text"), catalogue())
def test_every_metric_is_explained(name: str, text: str) -> None:
    assert name.startswith("drover_")
    assert len(text) > 30
    assert text.endswith(".")
    assert f"# HELP {name} " in page(snapshot())


def test_the_documents_name_every_metric_and_no_other() -> None:
    page = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()
    assert set(re.findall(r"`(drover_\w+)", page)) == {name for name, _ in catalogue()}

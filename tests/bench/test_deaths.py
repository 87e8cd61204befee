"""From the times of answers to what the README says of a death."""

from pathlib import Path

from bench import deaths
from bench.deaths import Death, summary
from bench.drover_server import deployment
from cluster.config import LinksConfig, parse_deployment


def test_the_summary_has_the_median_and_the_worst() -> None:
    statuses = [frozenset({"UNAVAILABLE"}), frozenset({"UNAVAILABLE", "CANCELLED"}), frozenset({"UNAVAILABLE"})]
    of_three = [
        Death(ended_s, s, silent_s) for ended_s, s, silent_s in zip((1, 2, 9), statuses, (4, 5, 3), strict=True)
    ]
    assert summary("a shard", of_three) == {
        "victim": "a shard",
        "repeats": 3,
        "streams_ended_s_median": 2,
        "streams_ended_s_worst": 9,
        "silent_s_median": 4,
        "silent_s_worst": 5,
        "statuses": ["CANCELLED", "UNAVAILABLE"],
    }


def test_shards_are_declared_dead_as_early_as_by_default() -> None:
    raw = deployment(Path("/models/mini"), deaths.SHAPE, 64, 9000, 8000, deaths.DEAD_AFTER_MS)
    assert parse_deployment(raw).links == LinksConfig()


def test_the_victims_are_parts_of_the_deployment() -> None:
    assert set(deaths.VICTIMS.values()) <= {"router-0", "", *(f"shard-{n}" for n in range(deaths.SHAPE.shards))}

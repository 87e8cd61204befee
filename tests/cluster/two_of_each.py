"""The deployment of two routers, two frontend replicas, and two shards that both hold every expert."""

from typing import Any

import ray

from cluster.reports import RouterStats
from tests.cluster.deployment import MAVERICK, actor
from tests.processes import PATIENCE_S

MODEL = MAVERICK[0]
CHANGES: dict[str, Any] = MAVERICK[1] | {
    "router": {"count": 2, "cpus": 0.25},
    "placement": {"replicas": 2},
    "frontend": {"replicas": 2},
}
ROUTERS, SHARDS = ("router-0", "router-1"), ("shard-0", "shard-1")
RESTART_S = 120.0


def stats_of(router: str) -> RouterStats:
    stats: RouterStats = ray.get(actor(router).stats.remote(), timeout=PATIENCE_S)
    return stats


def is_ready(router: str) -> bool:
    try:
        ready: bool = ray.get(actor(router).readiness.remote(), timeout=PATIENCE_S).ready
    except ray.exceptions.RayError:
        return False
    return ready


def is_well(router: str) -> bool:
    """Whether the router is ready, linked to all shards, and both frontends know it."""
    try:
        stats = stats_of(router)
    except ray.exceptions.RayError:
        return False
    return is_ready(router) and (stats.down, stats.drained, stats.life_lines) == ({}, (), 2)

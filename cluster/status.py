"""Asks every router and shard of a deployment for its state and counts."""

from dataclasses import asdict, dataclass
from typing import Any

import ray

from cluster.names import part_names
from cluster.reports import ActorState, RouterStats, ShardStats

TIMEOUT_S = 5.0


@dataclass(frozen=True)
class PartStatus:
    """The answer of one router or shard. Without one, state and stats are None; `error` says why."""

    name: str
    state: ActorState | None
    stats: RouterStats | ShardStats | None
    error: str = ""


def read_status(namespace: str) -> list[PartStatus]:
    """Ask every actor of the deployment in `namespace`, routers first; empty if nothing runs."""
    names = part_names(namespace)
    asked = []
    for name in names:
        try:
            actor = ray.get_actor(name, namespace=namespace)
            asked.append((name, actor.state.remote(), actor.stats.remote()))
        except (ValueError, ray.exceptions.RayError):
            continue  # it ended in the meantime
    parts = []
    for name, state, stats in asked:
        try:
            answered_state, answered_stats = ray.get([state, stats], timeout=TIMEOUT_S)
            parts.append(PartStatus(name, answered_state, answered_stats))
        except ray.exceptions.GetTimeoutError:
            parts.append(PartStatus(name, None, None, f"did not answer within {TIMEOUT_S:g} s"))
        except ray.exceptions.RayError:
            parts.append(PartStatus(name, None, None, "is down; Ray restarts it"))
    return parts


def as_json(parts: list[PartStatus]) -> dict[str, Any]:
    """Plain data for scripts: {"routers": [...], "shards": [...]}."""
    groups: dict[str, list[dict[str, Any]]] = {"routers": [], "shards": []}
    for part in parts:
        kind = "routers" if part.name.startswith("router-") else "shards"
        entry: dict[str, Any] = {"name": part.name, "phase": part.state.phase.value if part.state else "unreachable"}
        entry["pid"] = part.state.pid if part.state else None
        entry["error"] = part.error or (part.state.error if part.state else "")
        entry["retry_s"] = part.state.retry_s if part.state else None
        groups[kind].append(entry | (asdict(part.stats) if part.stats else {}))
    return groups

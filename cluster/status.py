"""Asks the controller and every router and shard of a deployment for state and counts."""

from dataclasses import asdict, dataclass
from typing import Any

import ray

from cluster.names import CONTROLLER, part_names
from cluster.reports import ActorState, ControllerStats, RouterStats, ShardStats

TIMEOUT_S = 5.0


@dataclass(frozen=True)
class PartStatus:
    """The answer of one router or shard. Without one, state and stats are None; `error` says why.

    node: the address of its node; empty while it has none. restarts: how often Ray has started it
    again.
    """

    name: str
    state: ActorState | None
    stats: RouterStats | ShardStats | None
    error: str = ""
    node: str = ""
    restarts: int = 0


def read_status(namespace: str) -> list[PartStatus]:
    """Ask every router and shard of the deployment in `namespace`, routers first; empty if nothing runs."""
    names = part_names(namespace)
    asked = []
    for name in names:
        try:
            actor = ray.get_actor(name, namespace=namespace)
            asked.append((name, actor, actor.state.remote(), actor.stats.remote()))
        except (ValueError, ray.exceptions.RayError):
            continue  # it ended in the meantime
    records = ray._private.state.actors() if asked else {}
    parts = []
    for name, actor, *answers in asked:
        record = records.get(actor._actor_id.hex(), {})
        state, stats, error = None, None, ""
        try:
            state, stats = ray.get(answers, timeout=TIMEOUT_S)
        except ray.exceptions.GetTimeoutError:
            error = f"did not answer within {TIMEOUT_S:g} s"
        except ray.exceptions.RayError:
            error = "is down; Ray restarts it"
        node = record.get("Address", {}).get("IPAddress", "") if record.get("State") == "ALIVE" else ""
        parts.append(PartStatus(name, state, stats, error, node, int(record.get("NumRestarts") or 0)))
    return parts


def read_wanted(namespace: str) -> ControllerStats | None:
    """What the controller wants; None if it does not answer."""
    try:
        controller = ray.get_actor(CONTROLLER, namespace=namespace)
        wanted: ControllerStats = ray.get(controller.stats.remote(), timeout=TIMEOUT_S)
    except (ValueError, ray.exceptions.RayError):
        return None
    return wanted


def as_json(parts: list[PartStatus], wanted: ControllerStats | None) -> dict[str, Any]:
    """Plain data for scripts: {"routers": [...], "shards": [...], "controller": {...} or null}.

    Parts that are wanted but do not exist are listed, too: phase "starting", or "drained".
    """
    groups: dict[str, list[dict[str, Any]]] = {"routers": [], "shards": []}
    found = {part.name: _entry(part) for part in parts}
    for name in dict.fromkeys((*(wanted.parts if wanted else ()), *found)):
        entry = found.get(name) or {"name": name, "phase": "starting", "pid": None, "error": "", "retry_s": None}
        if entry.get("draining_s") is not None:
            entry["phase"] = "draining"
        if wanted is not None:
            if name in wanted.drained:
                entry["phase"] = "draining" if name in found else "drained"
            if not entry["error"]:
                entry["error"] = wanted.problems.get(name, "")
            if name in wanted.slots:
                entry["experts_wanted"] = wanted.slots[name]
        groups["routers" if name.startswith("router-") else "shards"].append(entry)
    return {**groups, "controller": asdict(wanted) if wanted else None}


def _entry(part: PartStatus) -> dict[str, Any]:
    state = part.state
    entry = {
        "name": part.name,
        "phase": state.phase.value if state else "unreachable",
        "pid": state.pid if state else None,
        "error": part.error or (state.error if state else ""),
        "retry_s": state.retry_s if state else None,
        "node": part.node,
        "restarts": part.restarts,
    }
    return entry | (asdict(part.stats) if part.stats else {})

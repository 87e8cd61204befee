"""Asks the controller and every router and shard of a deployment for state and counts."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ray

from cluster.events import Event
from cluster.names import CONTROLLER, part_names
from cluster.reports import ActorState, ControllerStats, LoadView, RouterStats, ShardStats

TIMEOUT_S = 5.0
"""Of all answers together."""
EVENTS = 10


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


@dataclass(frozen=True)
class DeploymentStatus:
    """parts: routers first; empty if nothing runs. The rest is the controller's answer; None without one."""

    parts: Sequence[PartStatus]
    wanted: ControllerStats | None = None
    load: LoadView | None = None
    events: Sequence[Event] | None = None


def read_status(namespace: str) -> DeploymentStatus:
    """Ask all parts of the deployment in `namespace` at once: a hung one keeps nobody else waiting."""
    calls, actors = _calls(namespace)
    answers = _answers(calls)
    records = ray._private.state.actors() if actors else {}
    parts = []
    for name, actor in actors.items():
        record = records.get(actor._actor_id.hex(), {})
        answer = answers.get(name)
        state, stats = answer if isinstance(answer, list) else (None, None)
        node = record.get("Address", {}).get("IPAddress", "") if record.get("State") == "ALIVE" else ""
        error = answer if isinstance(answer, str) else ""
        parts.append(PartStatus(name, state, stats, error, node, int(record.get("NumRestarts") or 0)))
    answer = answers.get(CONTROLLER)
    return DeploymentStatus(parts, *answer) if isinstance(answer, list) else DeploymentStatus(parts)


def _calls(namespace: str) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """The calls to each part and to the controller, and the parts' handles."""
    calls, actors = {}, {}
    for name in (*part_names(namespace), CONTROLLER):
        try:
            actor = ray.get_actor(name, namespace=namespace)
            if name == CONTROLLER:
                newest = actor.events_after.remote(0, EVENTS)
                calls[name] = [actor.stats.remote(), actor.load.remote(), newest]
            else:
                calls[name], actors[name] = [actor.state.remote(), actor.stats.remote()], actor
        except (ValueError, ray.exceptions.RayError):
            continue  # it ended in the meantime
    return calls, actors


def _answers(calls: Mapping[str, Sequence[Any]]) -> dict[str, list[Any] | str]:
    """The answers of each part, or why there are none."""
    asked = [call for each in calls.values() for call in each]
    ready, late = ray.wait(asked, num_returns=len(asked), timeout=TIMEOUT_S) if asked else ([], [])
    for call in late:
        ray.cancel(call)
    answers: dict[str, list[Any] | str] = {}
    for name, each in calls.items():
        if not {*each} <= {*ready}:
            answers[name] = f"did not answer within {TIMEOUT_S:g} s"
            continue
        try:
            answers[name] = ray.get(list(each))
        except ray.exceptions.RayError:
            answers[name] = "is down; Ray restarts it"
    return answers


def as_json(status: DeploymentStatus) -> dict[str, Any]:
    """Plain data for scripts: lists of routers, shards, layers and events, and what the controller wants.

    {"routers": [...], "shards": [...], "controller": {...} or null, "load": {"age_s": ..., "layers":
    [{"layer": ..., "load": [...], "copies": [...]}]} or null, "events": [...]}. Parts that are
    wanted but do not exist are listed, too: phase "starting", or "drained".
    """
    groups: dict[str, list[dict[str, Any]]] = {"routers": [], "shards": []}
    found, wanted = {part.name: _entry(part) for part in status.parts}, status.wanted
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
    return {
        **groups,
        "controller": asdict(wanted) if wanted else None,
        "load": _load(status.load) if status.load else None,
        "events": [asdict(event) for event in status.events or ()],
    }


def _load(view: LoadView) -> dict[str, Any]:
    layers = [
        {"layer": layer, "load": view.load.get(layer, []), "copies": copies} for layer, copies in view.copies.items()
    ]
    return {"age_s": view.age_s, "layers": layers}


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

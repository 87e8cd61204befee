"""Looks at a deployment's parts as they are now, for the controller."""

import json
import threading
import time
from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any

import ray
from ray._private import ray_constants
from ray.experimental import internal_kv

from cluster.names import part_names
from cluster.part_names import part_number, router_of_link
from cluster.policy.wanted import Found, Held, Orders
from cluster.reports import ActorState, Phase, RouterStats, ShardStats

GROUP_LABEL = "ray.io/node-group"
LOOK_TIMEOUT_S = 3.0
"""For all parts together."""


class Running:
    """The routers and shards of one deployment, for any thread."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._rows_computed: dict[str, int] = {}
        self._routers_last: dict[str, tuple[float, Found]] = {}  # when each router last answered, and what
        self._lock = threading.Lock()

    def actor(self, name: str) -> Any:
        """Its handle. Raises ValueError if it does not exist."""
        return ray.get_actor(name, namespace=self._namespace)

    def look(self) -> dict[str, Found]:
        """Every part that exists, also those that Ray starts again just now. Blocks while Ray's head is away."""
        with self._lock:
            return self._look()

    def _look(self) -> dict[str, Found]:
        handles = {}
        for name in part_names(self._namespace):
            try:
                handles[name] = self.actor(name)
            except ValueError:
                continue  # it ended in the meantime
        records = ray._private.state.actors()
        answers = _ask(handles)
        found = {}
        for name, handle in handles.items():
            record = records.get(handle._actor_id.hex(), {})
            node = record.get("Address", {}).get("NodeID") if record.get("State") == "ALIVE" else None
            part = self._found(name, node, *answers.get(name, (None, None)))
            found[name] = replace(part, restarts=int(record.get("NumRestarts") or 0))
        return found

    def _found(
        self, name: str, node: str | None, state: ActorState | None, stats: RouterStats | ShardStats | None
    ) -> Found:
        if state is None or stats is None:
            return self._without_answer(name, node)
        is_ready = state.phase is Phase.READY
        if isinstance(stats, ShardStats):
            is_idle = self._rows_computed.get(name) == stats.rows_computed
            self._rows_computed[name] = stats.rows_computed
            links = frozenset(map(router_of_link, stats.links))
            held = Held(stats.order, stats.missing, links, stats.problem, stats.failures)
            return Found(node, is_ready, is_idle, held=held)
        numbers = frozenset(map(part_number, stats.drained))
        orders = Orders(stats.draining_s is not None, numbers, stats.is_stopping, stats.shard_names)
        open_requests = stats.open_requests
        found = Found(
            node,
            is_ready,
            open_requests == 0,
            orders,
            stats.draining_s or 0.0,
            open_requests,
            unlinked=stats.down,
            epoch=stats.epoch,
        )
        self._routers_last[name] = time.monotonic(), found
        return found

    def _without_answer(self, name: str, node: str | None) -> Found:
        """A router whose process lives does what it did when it last answered: it may be frozen, or busy."""
        if node is None or name not in self._routers_last:
            return Found(node, is_ready=False, is_idle=True)
        seen_s, found = self._routers_last[name]
        is_draining = found.orders is not None and found.orders.is_draining
        ago_s = time.monotonic() - seen_s if is_draining else 0.0
        return replace(found, node=node, is_ready=False, draining_s=found.draining_s + ago_s, epoch=None)


def _ask(handles: Mapping[str, Any]) -> dict[str, tuple[ActorState, Any]]:
    """State and stats of those that answer in time."""
    asked = {name: (handle.state.remote(), handle.stats.remote()) for name, handle in handles.items()}
    answers = [answer for pair in asked.values() for answer in pair]
    if not answers:
        return {}
    ready, late = ray.wait(answers, num_returns=len(answers), timeout=LOOK_TIMEOUT_S)
    for answer in late:
        ray.cancel(answer)
    answered = {}
    for name, pair in asked.items():
        if {*pair} <= {*ready}:
            try:
                answered[name] = tuple(ray.get(list(pair)))
            except ray.exceptions.RayError:
                continue  # it died, or is being started again
    return answered


def nodes(*, also_dead: bool = False) -> list[dict[str, str]]:
    """The nodes of the Ray cluster, the living ones first: id, address and host of each."""
    return [
        {"id": node["NodeID"], "address": node["NodeManagerAddress"], "host": node["NodeManagerHostname"]}
        for node in sorted(ray.nodes(), key=lambda node: not node["Alive"])
        if node["Alive"] or also_dead
    ]


def free_by_node(without: Container[str]) -> dict[str, dict[str, float]]:
    """What is left on each living node, by node id, but those in `without`."""
    alive = {node["id"] for node in nodes()}
    left: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()
    return {node: resources for node, resources in left.items() if node in alive and node not in without}


def has_autoscaler() -> bool:
    """Whether Ray may add nodes by itself, as far as it tells.

    An autoscaler gives nodes types: in its report, or as labels. Where there is none, what reports in
    its place makes a type of each node's id.
    """
    stored = internal_kv._internal_kv_get(ray_constants.DEBUG_AUTOSCALING_STATUS)
    report = (json.loads(stored).get("autoscaler_report") if stored else None) or {}
    types = (report.get("node_type_mapping") or {}).items()
    is_reported = any(node_type != f"node_{node}" for node, node_type in types)
    return is_reported or any(GROUP_LABEL in node.get("Labels", {}) for node in ray.nodes())

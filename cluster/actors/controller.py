"""The controller as a Ray actor: holds what is wanted of a deployment, and makes it so.

Tokens never pass here, and nobody who computes them waits for it. Killed, it is started again by
Ray and goes on from what it has written into Ray's own store, and from what routers and shards say.
"""

import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ray

from cluster.actors.creation import Blueprint
from cluster.names import app_name
from cluster.part_names import part_number
from cluster.policy.drain import NoRoom, matching_nodes, new_nodes, objection
from cluster.policy.reconcile import Action, Create, Kill, Tell, going, reconcile
from cluster.policy.wanted import Found, Wanted, leaving
from cluster.reports import ActorState, ControllerStats, DrainProgress, Phase
from cluster.running import Running, free_by_node, nodes
from cluster.stored_drains import StoredDrains, read_drains, write_drains
from experts.placement import Placement, Slot

logger = logging.getLogger(__name__)

WATCH_S = 1.0
"""How often the controller looks at all parts. Ray tells nobody when an actor is gone for good."""
SOON_S = 0.1
CALL_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class ControllerSpec:
    """blueprints: of every part, routers first, shards by number."""

    namespace: str
    blueprints: tuple[Blueprint, ...]
    placement: Placement


@dataclass(frozen=True)
class _View:
    """What was found at one look, and what was wanted then. problems: actions that failed, by part."""

    wanted: Wanted
    found: Mapping[str, Found] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)


class ControllerActor:
    """Threaded: calls run side by side, and a thread watches."""

    def __init__(self, spec: ControllerSpec) -> None:
        self._spec = spec
        self._blueprints = {blueprint.name: blueprint for blueprint in spec.blueprints}
        stored = read_drains(spec.namespace)
        self._moved = set(stored.moved)
        self._wanted = Wanted(
            routers=tuple(blueprint.name for blueprint in spec.blueprints if not blueprint.is_shard),
            shards=tuple(blueprint.name for blueprint in spec.blueprints if blueprint.is_shard),
            placement=spec.placement,
            drained=stored.drained,
            cleared=stored.cleared,
        )
        self._running = Running(spec.namespace)
        self._view = _View(self._wanted)
        self._lock = threading.Lock()  # of decisions: one drain is judged and noted at a time
        self._wake = threading.Event()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def state(self) -> ActorState:
        return ActorState(os.getpid(), Phase.READY, 0, 0)

    def stats(self) -> ControllerStats:
        wanted = self._wanted
        slots = {name: len(self.slots_of(name)) for name in wanted.shards}
        return ControllerStats(
            wanted.parts, dict(wanted.drained), dict(wanted.cleared), slots, dict(self._view.problems)
        )

    def slots_of(self, shard: str) -> Mapping[Slot, int]:
        """What the shard is to hold: the version of each slot's weights."""
        return self._wanted.placement.slots_of(part_number(shard))

    def drain(self, target: str, grace_s: float) -> str:
        """Let a part, or all parts of a node, go; returns why not, or an empty string.

        Goes on by itself; `drain_progress` tells how far it is. Asked again, it changes nothing but
        the grace.
        """
        with self._lock:
            found = self._running.look()
            wanted = self._wanted
            if target in wanted.parts:
                refusal = "" if target in wanted.drained else objection(target, wanted, found)
                if not refusal:
                    self._want(replace(wanted, drained={**wanted.drained, target: grace_s}))
                return refusal
            node, refusal = self._living_node(target)
            if refusal:
                return refusal
            cleared = replace(wanted, cleared={**wanted.cleared, node: grace_s})
            leaves = leaving(cleared, found).keys() - wanted.drained.keys()
            try:
                new_nodes({name: self._blueprints[name].needs for name in leaves}, free_by_node(cleared.cleared))
            except NoRoom as error:
                return str(error)
            self._want(cleared)
            return ""

    def undo_drain(self, target: str) -> str:
        """Want a drained part, or a cleared node, again; returns why not, or an empty string."""
        with self._lock:
            wanted = self._wanted
            if target in wanted.parts:
                if target not in wanted.drained:
                    return f"{target} is not drained"
                self._want(replace(wanted, drained=_without(wanted.drained, target)))
                return ""
            node = self._cleared_node(target)
            if node is None:
                return f"{target} is not drained"
            self._want(replace(wanted, cleared=_without(wanted.cleared, node)))
            return ""

    def stop_serving(self) -> DrainProgress:
        """Refuse new requests, for good; returns what still runs. To be asked until nothing does.

        A controller that was started again has forgotten it until then: it is not stored, since
        whoever stops a deployment is there until it has ended.
        """
        with self._lock:
            self._wanted = replace(self._wanted, is_stopping=True)
        self._wake.set()
        view = self._view
        routers = {name: part for name, part in view.found.items() if part.orders is not None}
        left = {name: f"{part.open_requests} requests" for name, part in routers.items() if not part.is_idle}
        is_told = view.wanted.is_stopping and all(part.orders.is_stopping for part in routers.values() if part.orders)
        return DrainProgress(is_told and not left, left)

    def drain_progress(self, target: str) -> DrainProgress:
        """How far a drain is: what is left there, and what each of it waits for."""
        view = self._view
        if target in view.wanted.parts:
            is_known, left = target in view.wanted.drained, {target} & view.found.keys()
        else:
            node = self._cleared_node(target)
            is_known = node in view.wanted.cleared
            left = {name for name, part in view.found.items() if is_known and part.node == node}
            left |= {name for name in view.wanted.parts if name not in view.found and name not in view.wanted.drained}
        return DrainProgress(is_known and not left, {name: self._waits_for(view, name) for name in sorted(left)})

    def _waits_for(self, view: _View, name: str) -> str:
        if name in view.problems:
            return view.problems[name]
        part = view.found.get(name)
        if part is None:
            return "is being started elsewhere"
        if name not in going(view.wanted, view.found):
            return "waits until its stand-ins are ready"
        if name in view.wanted.shards:
            return "is left alone by the routers"
        left_s = max(0.0, leaving(view.wanted, view.found)[name] - part.draining_s)
        return f"finishes its requests, for {left_s:.0f} s more at most"

    def _living_node(self, target: str) -> tuple[str, str]:
        """The id of the node that `target` names, and why there is none."""
        alive = nodes()
        matching = matching_nodes(target, alive)
        if len(matching) == 1:
            return matching[0], ""
        if matching:
            return "", f"{target} names {len(matching)} nodes; name one by its id: {', '.join(matching)}"
        parts, known = ", ".join(self._wanted.parts), ", ".join(node["address"] for node in alive)
        return "", f"{target} is neither a part nor a node; parts are {parts}; nodes are {known}"

    def _cleared_node(self, target: str) -> str | None:
        """The id of the cleared node that `target` names, also if that node is dead by now."""
        cleared = [node for node in nodes(also_dead=True) if node["id"] in self._wanted.cleared]
        return next(iter(matching_nodes(target, cleared)), None)

    def _want(self, wanted: Wanted) -> None:
        self._store(wanted)
        self._wanted = wanted
        self._wake.set()

    def _store(self, wanted: Wanted) -> None:
        drains = StoredDrains(dict(wanted.drained), dict(wanted.cleared), sorted(self._moved))
        write_drains(self._spec.namespace, drains)

    def _watch(self) -> None:
        while True:
            acted = False
            try:
                acted = self._look_and_act()
            except Exception:
                logger.exception("watching failed")
            self._wake.wait(SOON_S if acted else WATCH_S)
            self._wake.clear()

    def _look_and_act(self) -> bool:
        """Whether anything was done, so that there may be more to do at once."""
        wanted, found = self._wanted, self._running.look()
        found |= {name: replace(found[name], can_go_home=True) for name in self._homeless(wanted, found)}
        problems = {}
        actions = reconcile(wanted, found)
        for action in actions:
            try:
                self._act(action, wanted)
            except Exception as error:  # it comes again with the next look
                name = action.router if isinstance(action, Tell) else action.part
                problems[name] = str(error)
                logger.warning("%s: %s", action, error)
        self._view = _View(wanted, found, problems)
        return len(actions) > len(problems)

    def _act(self, action: Action, wanted: Wanted) -> None:
        logger.info("%s", action)
        match action:
            case Tell(router, orders):
                ray.get(self._running.actor(router).follow.remote(orders), timeout=CALL_TIMEOUT_S)
            case Kill(part):
                ray.kill(self._running.actor(part), no_restart=True)
            case Create(part):
                self._create(part, wanted)

    def _create(self, part: str, wanted: Wanted) -> None:
        """In the part's own bundle; if that is on a cleared node, on another node with room."""
        blueprint = self._blueprints[part]
        group = ray.util.get_placement_group(app_name(self._spec.namespace))
        node = None
        if self._home(group, part) in wanted.cleared:
            node = new_nodes({part: blueprint.needs}, free_by_node(wanted.cleared))[part]
        blueprint.create(group, node)
        if (node is not None) != (part in self._moved):
            with self._lock:
                self._moved ^= {part}
                self._store(self._wanted)

    def _home(self, group: Any, part: str) -> str | None:
        """The node of the part's bundle, as Ray has it."""
        home: str | None = ray.util.placement_group_table(group)["bundles_to_node_id"].get(
            self._blueprints[part].bundle
        )
        return home

    def _homeless(self, wanted: Wanted, found: Mapping[str, Found]) -> list[str]:
        """Moved parts for which Ray finds no node, though that of their bundle may be used."""
        lost = [name for name in self._moved if name in found and found[name].node is None]
        if not lost:
            return []
        group = ray.util.get_placement_group(app_name(self._spec.namespace))
        usable = {node["id"] for node in nodes()} - wanted.cleared.keys()
        return [name for name in lost if self._home(group, name) in usable]


def _without(mapping: Mapping[str, float], key: str) -> dict[str, float]:
    return {other: value for other, value in mapping.items() if other != key}

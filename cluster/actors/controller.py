"""The controller as a Ray actor: holds what is wanted of a deployment, and makes it so.

Tokens never pass here, and nobody who computes them waits for it. Killed, it is started again by
Ray and goes on from what it has written into Ray's own store, and from what routers and shards say.
"""

import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace

import ray

from cluster.actors.autoscaler import Autoscaler, ScalingSpec
from cluster.actors.creation import Blueprint
from cluster.actors.desired import Desired, View
from cluster.actors.drains import Drains
from cluster.actors.part_factory import PartFactory
from cluster.actors.placement_keeper import PlacementKeeper
from cluster.actors.resizing import Outside, Resizing
from cluster.admin.server import AdminServer, AdminSettings
from cluster.admin.service import AdminService
from cluster.events import Event, EventLog
from cluster.frontends import scale_frontends
from cluster.names import CONTROLLER
from cluster.part_names import part_number
from cluster.policy.part_events import part_events
from cluster.policy.reconcile import Action, Create, Forget, Kill, Tell, reconcile
from cluster.policy.wanted import Resize, Wanted, forgotten
from cluster.reports import (
    ActorState,
    ControllerStats,
    DrainProgress,
    HoldOrder,
    LoadView,
    OperationStatus,
    Phase,
    RebalanceReport,
)
from cluster.running import Running
from cluster.status import as_json, read_status
from cluster.stored_events import read_events, write_events
from experts.placement import Placement

logger = logging.getLogger(__name__)

WATCH_S = 1.0
"""How often the controller looks at all parts. Ray tells nobody when an actor is gone for good."""
CHANGE_S = 0.4
"""The same while a placement changes."""
SOON_S = 0.1
CALL_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class ControllerSpec:
    """blueprints: of every part, routers first, shards by number.

    placement: to begin with. slots: of each shard, for each MoE layer. expert_bytes: of one expert,
    by layer. replicas: copies that each expert has at least. frontends: how many. grace_s: how long
    requests of a router that a resize lets go may go on.
    """

    namespace: str
    blueprints: tuple[Blueprint, ...]
    placement: Placement
    slots: int
    expert_bytes: Mapping[int, int]
    replicas: int
    frontends: int
    grace_s: float
    admin: AdminSettings
    scaling: ScalingSpec


class ControllerActor:
    """Threaded: calls run side by side, and a thread watches."""

    def __init__(self, spec: ControllerSpec) -> None:
        self._spec = spec
        begun_with = Wanted(
            routers=tuple(blueprint.name for blueprint in spec.blueprints if not blueprint.is_shard),
            shards=tuple(blueprint.name for blueprint in spec.blueprints if blueprint.is_shard),
            placement=spec.placement,
            replicas=spec.replicas,
            frontends=spec.frontends,
        )
        self._desired = Desired(spec.namespace, begun_with)
        self._factory = PartFactory(spec.namespace, spec.blueprints, self._desired)
        self._running = Running(spec.namespace)
        self._drains = Drains(self._desired, self._running, self._factory)
        self.events = EventLog(read_events(spec.namespace), lambda text: write_events(spec.namespace, text))
        self._placement = PlacementKeeper(
            spec.namespace, self._desired, self._running, self.events, spec.slots, spec.expert_bytes
        )
        self._resizing = Resizing(
            self._desired,
            self._running,
            self._factory,
            self._placement,
            self.events,
            spec.slots,
            spec.grace_s,
            Outside(scale_frontends=lambda count: scale_frontends(spec.namespace, count)),
        )
        self._view = View(self._desired.wanted)
        self._autoscaler = Autoscaler(
            spec.namespace,
            spec.scaling,
            self._desired,
            self._running,
            self._placement,
            self._resizing,
            self.events,
            lambda: self._view,
        )
        service = AdminService(self, lambda: as_json(read_status(spec.namespace)))
        self._admin = AdminServer(service, spec.namespace, spec.admin)
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def state(self) -> ActorState:
        return ActorState(os.getpid(), Phase.READY, 0, 0)

    def stats(self) -> ControllerStats:
        wanted = self._desired.wanted
        slots = {name: len(wanted.placement.slots_of(part_number(name))) for name in wanted.shards}
        return ControllerStats(
            wanted.parts,
            dict(wanted.drained),
            dict(wanted.cleared),
            slots,
            dict(self._view.problems),
            self._resizing.status(self._view) or self._placement.operation(),
            self._autoscaler.mode,
            admin=self._admin.view,
        )

    def load(self) -> LoadView:
        """The load of each expert as it was last measured, and on how many shards it is."""
        return self._autoscaler.load()

    def events_after(self, number: int, limit: int) -> list[Event]:
        """The newest `limit` events after this number, oldest first."""
        return self.events.after(number, limit)

    def operation(self, operation_id: str) -> OperationStatus | None:
        """What is known of an operation that runs, or has ended not too long ago."""
        running = self.stats().operation
        if running is not None and running.operation_id == operation_id:
            return running
        return self.events.operation(operation_id) or self._placement.ended(operation_id)

    def part_names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The routers and the shards, also those that are drained."""
        return self._desired.wanted.routers, self._desired.wanted.shards

    def resize(
        self,
        operation_id: str,
        shards: int | None = None,
        routers: int | None = None,
        replicas: int | None = None,
        frontends: int | None = None,
    ) -> str:
        """Change the numbers of parts; None leaves one as it is. Returns why not, or an empty string.

        replicas: copies that each expert has at least. Goes on by itself; `operation` tells how far it
        is. Asked again, it changes nothing.
        """
        return self._resizing.begin(Resize(operation_id, shards, routers, replicas, frontends))

    def rebalance(self, operation_id: str, is_dry_run: bool) -> RebalanceReport:
        """Place experts anew by their load, if it is worth it, or tell what that would do."""
        return self._autoscaler.rebalance(operation_id, is_dry_run)

    def decisions(self) -> list[str]:
        """What autoscaling has decided lately, and on what grounds: a line of JSON each."""
        return self._autoscaler.decisions()

    def abort(self, operation_id: str) -> str:
        """End an operation; returns why not, or an empty string. A resize goes back to what was before."""
        resize = self._desired.wanted.resize
        if resize is not None and resize.operation_id == operation_id:
            return self._resizing.abort(operation_id)
        return self._placement.abort(operation_id)

    def pause_autoscaling(self, is_paused: bool) -> str:
        """Scale and rebalance nothing from now on, or again; returns why not, or an empty string."""
        return self._autoscaler.pause(is_paused)

    def slots_of(self, shard: str) -> HoldOrder:
        """What the shard is to hold."""
        return self._placement.slots_of(part_number(shard))

    def placement(self) -> Placement:
        """What routers are to route."""
        return self._placement.state.current

    def change(self, operation_id: str, target: Placement, kind: str) -> str:
        """Go to another placement; returns why not, or an empty string.

        Goes on by itself, and ends or is aborted by itself; `operation` tells how far it is. Asked
        again, it changes nothing. kind: who wants it, such as "rebalance".
        """
        return self._placement.change(operation_id, target, kind)

    def drain(self, target: str, grace_s: float) -> str:
        """Let a part, or all parts of a node, go; returns why not, or an empty string.

        Goes on by itself; `drain_progress` tells how far it is. Asked again, it changes nothing but
        the grace.
        """
        return self._drains.drain(target, grace_s)

    def undo_drain(self, target: str) -> str:
        """Want a drained part, or a cleared node, again; returns why not, or an empty string."""
        return self._drains.undo(target)

    def drain_progress(self, target: str) -> DrainProgress:
        """How far a drain is: what is left there, and what each of it waits for."""
        return self._drains.progress(target, self._view)

    def stop_serving(self) -> DrainProgress:
        """Refuse new requests, for good; returns what still runs. To be asked until nothing does.

        A controller that was started again has forgotten it until then: it is not stored, since
        whoever stops a deployment is there until it has ended.
        """
        with self._desired.lock:
            self._desired.want_unstored(replace(self._desired.wanted, is_stopping=True))
        view = self._view
        routers = {name: part for name, part in view.found.items() if part.orders is not None}
        left = {name: f"{part.open_requests} requests" for name, part in routers.items() if not part.is_idle}
        is_told = view.wanted.is_stopping and all(part.orders.is_stopping for part in routers.values() if part.orders)
        return DrainProgress(is_told and not left, left)

    def _watch(self) -> None:
        while True:
            acted = False
            try:
                acted = self._look_and_act()
            except Exception:
                logger.exception("watching failed")
            self.events.store()
            is_settled = self._placement.state.is_settled and self._desired.wanted.resize is None
            pause_s = WATCH_S if is_settled else CHANGE_S
            self._desired.changed.wait(SOON_S if acted else pause_s)
            self._desired.changed.clear()

    def _look_and_act(self) -> bool:
        """Whether anything was done, so that there may be more to do at once."""
        wanted, found = self._desired.wanted, self._running.look()
        found |= {name: replace(found[name], can_go_home=True) for name in self._factory.homeless(wanted, found)}
        problems = {}
        actions = reconcile(wanted, found)
        for action in actions:
            try:
                self._act(action, wanted)
            except Exception as error:  # it comes again with the next look
                name = action.router if isinstance(action, Tell) else action.part
                problems[name] = str(error)
                logger.warning("%s: %s", action, error)
        if not self._view.found:
            self.events.add("part", CONTROLLER, f"looks after {len(found)} parts")
        else:
            for part, text in part_events(self._view.found, found):
                self.events.add("part", part, text)
        self._view = View(wanted, found, problems)
        has_moved = self._placement.look(found)
        self._resizing.look(self._view)
        return has_moved or len(actions) > len(problems)

    def _act(self, action: Action, wanted: Wanted) -> None:
        logger.info("%s", action)
        match action:
            case Tell(router, orders):
                ray.get(self._running.actor(router).follow.remote(orders), timeout=CALL_TIMEOUT_S)
            case Kill(part):
                ray.kill(self._running.actor(part), no_restart=True)
            case Create(part):
                self._factory.create(part, wanted)
            case Forget(part):
                with self._desired.lock:
                    self._desired.want(forgotten(part, self._desired.wanted))

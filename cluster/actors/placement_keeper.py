"""The placement of a deployment, and going to another one: stored first, then told to shards and routers."""

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray

from cluster.actors.desired import Desired
from cluster.events import EventLog
from cluster.names import part_names
from cluster.policy.change import Change, Ended, Hold, PlacementState, Plan, Route, abort, begin, recovered
from cluster.policy.wanted import Found
from cluster.reports import HoldOrder, OperationStatus
from cluster.running import Running
from cluster.stored_placement import read_placement, write_placement
from experts.placement import Placement

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 5.0
"""For all that are told at one look; who does not answer is told again."""

STALLED_S = 120.0
"""A change is aborted when its shards have got no nearer to a step for so long."""


class PlacementKeeper:
    """For any thread; `look` is for the controller's watch. Keeps `Desired.wanted.placement` the current one."""

    def __init__(
        self,
        namespace: str,
        desired: Desired,
        running: Running,
        events: EventLog,
        slots: int,
        expert_bytes: Mapping[int, int],
    ) -> None:
        """slots: of each shard, for each MoE layer. expert_bytes: of one expert, by layer."""
        self._namespace, self._desired, self._running, self._events = namespace, desired, running, events
        self._slots, self._expert_bytes = slots, expert_bytes
        self._found: Mapping[str, Found] = {}
        self._progress: tuple[object, float] = (None, time.monotonic())
        stored = read_placement(namespace)
        if stored is None:
            stored = recovered(desired.wanted.placement, self._routed(), time.time_ns() // 10**6)
            write_placement(namespace, stored)
        self._follow(stored)

    @property
    def state(self) -> PlacementState:
        return self._plan.state

    def slots_of(self, shard: int) -> HoldOrder:
        """What a shard is to hold now."""
        plan = self._plan
        return HoldOrder(plan.state.revision, plan.slots_of(shard))

    def change(self, operation_id: str, target: Placement, kind: str) -> str:
        """Go to another placement; returns why not, or an empty string. Asked again, it changes nothing."""
        with self._desired.lock:
            wanted = self._desired.wanted
            change = Change(operation_id, target, kind)
            state, refusal = begin(self._plan, change, frozenset(wanted.shards), wanted.drained.keys())
            if state is not self.state:
                self._put(state)
            return refusal

    def abort(self, operation_id: str) -> str:
        """Want no change any more; returns why not, or an empty string. What was committed stays."""
        with self._desired.lock:
            state, refusal = abort(self.state, operation_id)
            if state is not self.state:
                self._put(state)
            return refusal

    def operation(self) -> OperationStatus | None:
        """The change that is under way, as it was at the last look."""
        plan, found = self._plan, self._found
        change = plan.state.change
        if change is None:
            return None
        steps = change.steps_done + plan.steps_left
        return OperationStatus(
            change.operation_id,
            change.kind,
            plan.phase(found),
            step=min(change.steps_done + (plan.state.previous is None), steps),
            steps=steps,
            waits_for=plan.waits_for(found),
            moved_bytes=change.moved_bytes,
            total_bytes=change.moved_bytes + plan.bytes_left,
        )

    def ended(self, operation_id: str) -> OperationStatus | None:
        """How the change has ended, if it was the last one."""
        ended = self.state.ended
        return _told(ended) if ended is not None and ended.operation_id == operation_id else None

    def look(self, found: Mapping[str, Found]) -> bool:
        """Do what follows from what was found; whether that was anything."""
        self._found = found
        with self._desired.lock:
            self._abort_stalled(found)
            state = self.state
            following = self._plan.next_state(found, self._desired.wanted.drained.keys())
            if following.previous is not None and state.previous is None:
                self.commit(following)
            elif following.previous is None and state.previous is not None:
                self.retire(following)
            elif following is not state:
                self._put(following)
        plan = self._plan
        tells = plan.tells(found)
        if plan.step is not None and any(isinstance(tell, Hold) for tell in tells):
            self.prepare(plan.step)
        return self._tell(tells) or following is not state

    def _abort_stalled(self, found: Mapping[str, Found]) -> None:
        """One that is dead for good, or hangs, must not keep every later change from being made."""
        now_s, (before, since_s), change = time.monotonic(), self._progress, self.state.change
        progress = self._plan.progress(found)
        if progress is None or progress != before:
            self._progress = progress, now_s
        elif change is not None and now_s - since_s > STALLED_S:
            reason = f"nothing has happened for {STALLED_S:g} s: {self._plan.waits_for(found)}"
            self._put(abort(self.state, change.operation_id, reason)[0])

    def prepare(self, step: Placement) -> None:
        """Shards are about to be told what they are to hold for the step."""
        logger.info("prepare placement %d", step.epoch)

    def commit(self, state: PlacementState) -> None:
        """From now on routers are to route by the step that shards hold."""
        logger.info("commit placement %d", state.current.epoch)
        self._put(state)

    def retire(self, state: PlacementState) -> None:
        """Nobody routes by the placement before any more."""
        logger.info("retire all placements before %d", state.current.epoch)
        self._put(state)

    def _put(self, state: PlacementState) -> None:
        ended = self.state.ended
        write_placement(self._namespace, state)
        self._follow(state)
        if state.ended is not None and state.ended != ended:
            self._events.ended(_told(state.ended))

    def _follow(self, state: PlacementState) -> None:
        self._plan = Plan(state, self._slots, self._expert_bytes)
        target = state.change.target if state.change is not None else None
        used = [placement.used_shards for placement in (state.previous, self._plan.step, target) if placement]
        with self._desired.lock:
            wanted = replace(self._desired.wanted, placement=state.current, changing=frozenset().union(*used))
            self._desired.want_unstored(wanted)

    def _tell(self, tells: list[Hold | Route]) -> bool:
        """Whether anybody was told anything."""
        calls = {}
        for tell in tells:
            name = tell.shard if isinstance(tell, Hold) else tell.router
            try:
                actor = self._running.actor(name)
            except ValueError:
                continue  # it has ended since it was found
            if isinstance(tell, Hold):
                calls[actor.hold.remote(HoldOrder(tell.order, tell.slots))] = name
            else:
                calls[actor.route.remote(tell.placement)] = name
        _wait(calls)
        return bool(calls)

    def _routed(self) -> list[Placement]:
        """What the routers that answer route, steps under way included."""
        calls = {}
        for name in part_names(self._namespace):
            if name.startswith("router-"):
                try:
                    calls[self._running.actor(name).placements_in_use.remote()] = name
                except ValueError:
                    continue  # it has just ended
        return [placement for in_use in _wait(calls) for placement in in_use]


def _wait(calls: Mapping[Any, str]) -> list[Any]:
    """The answers of those that answer in time."""
    if not calls:
        return []
    ready, late = ray.wait(list(calls), num_returns=len(calls), timeout=CALL_TIMEOUT_S)
    for answer in late:
        ray.cancel(answer)
        logger.warning("%s did not answer within %g s", calls[answer], CALL_TIMEOUT_S)
    answers = []
    for answer in ready:
        try:
            answers.append(ray.get(answer))
        except ray.exceptions.RayError as error:
            logger.warning("%s: %s", calls[answer], error)
    return answers


def _told(ended: Ended) -> OperationStatus:
    reason = ended.outcome.removeprefix("aborted: ") if ended.outcome != "done" else ""
    return OperationStatus(
        ended.operation_id,
        ended.kind,
        "aborted" if reason else "done",
        step=ended.steps_done,
        steps=ended.steps_done,
        moved_bytes=ended.moved_bytes,
        total_bytes=ended.moved_bytes,
        reason=reason,
    )

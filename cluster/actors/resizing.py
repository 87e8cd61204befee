"""Changes a deployment's numbers of parts, look by look, until nothing follows from that any more."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from cluster.actors.desired import Desired, View
from cluster.actors.part_factory import PartFactory
from cluster.events import EventLog
from cluster.policy import resize as policy
from cluster.policy.change import PlacementState
from cluster.policy.migration import same_slots
from cluster.policy.resize import Room
from cluster.policy.wanted import Found, Resize, Wanted
from cluster.reports import OperationStatus
from cluster.running import Running, free_by_node, has_autoscaler
from experts.placement import Placement

logger = logging.getLogger(__name__)

KIND = "resize"


class Placements(Protocol):
    """What moves experts between shards, and keeps the wanted placement the current one."""

    @property
    def state(self) -> PlacementState: ...

    def change(self, operation_id: str, target: Placement, kind: str) -> str:
        """Move experts; returns why not, or an empty string. What is under way already goes on."""
        ...

    def abort(self, operation_id: str) -> str:
        """End that; returns why not, or an empty string."""
        ...

    def operation(self) -> OperationStatus | None:
        """What is under way; None if nothing is."""
        ...


@dataclass(frozen=True)
class Outside:
    """What only Ray knows or does. scale_frontends: True once there are so many."""

    free_by_node: Callable[[Wanted], dict[str, dict[str, float]]] = lambda wanted: free_by_node(wanted.cleared)
    has_autoscaler: Callable[[], bool] = has_autoscaler
    scale_frontends: Callable[[int], bool] = lambda count: True


class Resizing:
    """For any thread; `look` comes from the controller's watch. Nothing is remembered but what is wanted."""

    def __init__(
        self,
        desired: Desired,
        running: Running,
        factory: PartFactory,
        placements: Placements,
        events: EventLog,
        slots: int,
        grace_s: float,
        outside: Outside,
    ) -> None:
        """slots: of each shard, for each MoE layer. grace_s: how long requests of a router that goes may go on."""
        self._desired, self._running, self._factory = desired, running, factory
        self._placements, self._events, self._outside = placements, events, outside
        self._slots, self._grace_s = slots, grace_s
        self._late = ""
        """Why the last look could not go on."""

    def begin(self, resize: Resize) -> str:
        """Change numbers of parts; returns why not, or an empty string. Asked again, it goes on, or has ended."""
        with self._desired.lock:
            ended = self._events.operation(resize.operation_id)
            if self._desired.wanted.resize is None and ended is not None:
                if ended.phase == "aborted":
                    return f"operation {ended.operation_id} was aborted: {ended.reason}; take another operation id"
                if (ended.kind, ended.text) != (KIND, policy.described(resize)):
                    was = f"{ended.kind} to {ended.text}" if ended.text else ended.kind
                    return f"operation {ended.operation_id} was {was} and has ended; take another operation id"
                return ""
            found = self._running.look()
            wanted = self._desired.wanted
            resized, refusal = policy.begin(resize, wanted, found, self._room(wanted), self._grace_s)
            if not refusal and resized is not wanted:
                self._desired.want(resized)
                self._events.add("operation", resize.operation_id, f"resize to {policy.described(resize)} began")
            return refusal

    def abort(self, operation_id: str) -> str:
        """Go back to what was wanted before; returns why not, or an empty string."""
        return self._go_back(operation_id, "as was asked for")

    def look(self, view: View) -> None:
        """Do what follows from the last look at all parts."""
        running = view.wanted.resize
        if running is None or running != self._desired.wanted.resize:
            return
        try:
            self._go_on(running, view.found)
        except Exception as error:
            self._late = f"the last look failed: {error}"
            raise

    def _go_on(self, running: Resize, found: Mapping[str, Found]) -> None:
        wanted = self._desired.wanted
        state = self._placements.state
        goal = policy.target(wanted, found, self._slots)
        is_placed = same_slots(goal, state.current) and state.is_settled
        self._late = "" if is_placed else self._move(running, goal, state)
        has_frontends = running.frontends is None or self._outside.scale_frontends(wanted.frontends)
        is_scaled = not wanted.released and not policy.waits_for(wanted, found) and has_frontends
        if is_placed and is_scaled:
            self._end(running)

    def status(self, view: View) -> OperationStatus | None:
        """The operation that is under way; None if there is none."""
        running = self._desired.wanted.resize
        if running is None:
            return None
        text = policy.described(running)
        moving = self._placements.operation()
        if moving is not None and moving.operation_id == _change_id(running):
            text += "; goes back" if running.aborted else ""
            return replace(moving, operation_id=running.operation_id, kind=KIND, text=text)
        waits_for = "; ".join(filter(None, [self._late, policy.waits_for(self._desired.wanted, view.found)]))
        return OperationStatus(running.operation_id, KIND, "scale", text, waits_for=waits_for)

    def _move(self, running: Resize, goal: Placement, state: PlacementState) -> str:
        """Have experts moved; returns what that waits for."""
        change_id = _change_id(running)
        if state.change is not None and state.change.operation_id != change_id:
            return f"operation {state.change.operation_id} ({state.change.kind}) is under way"
        if state.change is not None or same_slots(goal, state.current):
            return ""
        ended = state.ended
        if ended is not None and ended.operation_id == change_id and ended.outcome.startswith("aborted"):
            if running.aborted:
                self._give_up(running, ended.outcome)
            else:
                self._go_back(running.operation_id, ended.outcome.removeprefix("aborted: "))
            return ""
        return self._placements.change(change_id, goal, KIND)

    def _go_back(self, operation_id: str, reason: str) -> str:
        with self._desired.lock:
            wanted, refusal = policy.abort(self._desired.wanted, operation_id, reason, self._grace_s)
            if refusal or wanted is self._desired.wanted:
                return refusal
            running = self._desired.wanted.resize
            assert running is not None
            self._desired.want(wanted)
            self._placements.abort(_change_id(running))  # a refusal says that it does not run any more
            self._events.add("operation", operation_id, f"goes back: {reason}")
            return ""

    def _give_up(self, running: Resize, outcome: str) -> None:
        """Going back failed, too: every shard that still holds something stays."""
        with self._desired.lock:
            wanted = self._desired.wanted
            kept = {name: grace_s for name, grace_s in wanted.released.items() if wanted.may_leave(name)}
            self._desired.want(replace(wanted, released=kept))
        self._end(replace(running, aborted=f"{running.aborted}; going back was {outcome}"))

    def _end(self, running: Resize) -> None:
        phase = "aborted" if running.aborted else "done"
        text = policy.described(running)
        # First, so that whoever asks for it finds it running or ended, also if this process ends here.
        self._events.ended(OperationStatus(running.operation_id, KIND, phase, text, reason=running.aborted))
        with self._desired.lock:
            self._desired.want(replace(self._desired.wanted, resize=None))

    def _room(self, wanted: Wanted) -> Room:
        return Room(
            self._slots,
            self._factory.needs_of_new,
            self._outside.free_by_node(wanted),
            self._outside.has_autoscaler(),
            self._factory.with_bundles,
        )


def _change_id(running: Resize) -> str:
    """Of the experts' part of it."""
    return f"{running.operation_id}: experts{' back' if running.aborted else ''}"

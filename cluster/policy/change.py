"""A change of placement, step by step: what is stored of it, and what follows from what was found.

Each step has two phases. Prepare: shards load what they are to hold beside what they hold. Commit:
once all of it is there, the step is stored as the current placement, and routers are told. The one
before is stored, too, until every router has acknowledged; only then do shards let go of its slots.

No phase is stored, and nothing else is remembered. So whoever is killed, at whatever point, the next
look goes on. Abort is nothing but to want no change any more.
"""

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass, field, replace
from functools import cached_property

from cluster.part_names import part_number, shard_name
from cluster.policy.migration import gains, next_step, objection, same_slots, steps_to
from cluster.policy.wanted import Found
from experts.placement import Placement, Slot

FAILURES = 3
"""A change is aborted when a shard has failed so often in a row to read what it needs."""
PREPARE, COMMIT, RETIRE = "prepare", "commit", "retire"


@dataclass(frozen=True)
class Change:
    """A change that is under way. kind: who wanted it, such as "rebalance" or "resize".

    steps_done: those that were committed. moved_bytes: of weights that these steps loaded.
    """

    operation_id: str
    target: Placement
    kind: str
    steps_done: int = 0
    moved_bytes: int = 0


@dataclass(frozen=True)
class Ended:
    """The change that ended last. outcome: "done", or "aborted: " and why."""

    operation_id: str
    kind: str
    outcome: str
    steps_done: int = 0
    moved_bytes: int = 0


@dataclass(frozen=True)
class PlacementState:
    """All that a controller stores of placements, before it acts on it.

    revision: grows with each change of this; the number of the orders that shards get.
    current: what routers are to route. previous: what some of them may still route; None: nobody does.
    """

    revision: int
    current: Placement
    previous: Placement | None = None
    change: Change | None = None
    ended: Ended | None = None

    @property
    def is_settled(self) -> bool:
        """Whether there is nothing left to do."""
        return self.change is None and self.previous is None


@dataclass(frozen=True)
class Hold:
    """Tell a shard to hold exactly these slots, each at this version of its weights."""

    shard: str
    order: int
    slots: Mapping[Slot, int]


@dataclass(frozen=True)
class Route:
    """Tell a router to route by this placement."""

    router: str
    placement: Placement


@dataclass(frozen=True)
class Plan:
    """What follows from a state, and what was found. slots: of each shard, for each MoE layer.

    expert_bytes: of one expert, by layer.
    """

    state: PlacementState
    slots: int
    expert_bytes: Mapping[int, int] = field(default_factory=dict)

    @cached_property
    def step(self) -> Placement | None:
        """The placement that shards prepare for now; None: there is nothing to prepare."""
        state = self.state
        if state.previous is not None or state.change is None or same_slots(state.current, state.change.target):
            return None
        return next_step(state.current, state.change.target, self.slots)

    @cached_property
    def gains(self) -> Mapping[int, list[Slot]]:
        """shard number -> the slots that it loads for the step."""
        return gains(self.state.current, self.step) if self.step is not None else {}

    @cached_property
    def bytes_left(self) -> int:
        """What shards are to read until the target."""
        change = self.state.change
        left = gains(self.state.current, change.target) if change is not None else {}
        return sum(self.expert_bytes.get(layer, 0) for slots in left.values() for layer, _ in slots)

    @cached_property
    def steps_left(self) -> int:
        """How many steps there will be until the target, the one under way included."""
        state = self.state
        if state.change is None:
            return 0
        return sum(1 for _ in steps_to(state.current, state.change.target, self.slots))

    def slots_of(self, shard: int) -> dict[Slot, int]:
        """What a shard is to hold now, what it needs first before the rest."""
        placements = (self.state.current, self.state.previous, self.step)
        return {
            slot: version
            for placement in placements
            if placement is not None
            for slot, version in placement.slots_of(shard).items()
        }

    def phase(self, found: Mapping[str, Found]) -> str:
        """PREPARE, COMMIT or RETIRE; empty if nothing is under way."""
        if self.state.previous is not None:
            return COMMIT if self._behind(found) else RETIRE
        return PREPARE if self.step is not None else ""

    def next_state(self, found: Mapping[str, Found], drained: Set[str] = frozenset()) -> PlacementState:
        """The state that follows; the same object if nothing does. drained: parts that are to be gone."""
        state, change = self.state, self.state.change
        order = max((part.held.order for part in found.values() if part.held is not None), default=0)
        epoch = max((part.epoch for part in found.values() if part.epoch is not None), default=0)
        if order > state.revision or epoch > state.current.epoch:  # Ray's store has lost what was told before
            current = replace(state.current, epoch=epoch + 1) if epoch > state.current.epoch else state.current
            return replace(state, revision=max(order, state.revision) + 1, current=current)
        if state.previous is not None:
            return state if self._waiting_routers(found) else _next(state, previous=None)
        if change is None:
            return state
        if self.step is None:
            return _next(state, change=None, ended=_ended(change, "done"))
        if problem := self._problem(found, drained):
            return _next(state, change=None, ended=_ended(change, f"aborted: {problem}"))
        if self._waiting_shards(found):
            return state
        moved = sum(self.expert_bytes.get(layer, 0) for slots in self.gains.values() for layer, _ in slots)
        change = replace(change, steps_done=change.steps_done + 1, moved_bytes=change.moved_bytes + moved)
        return _next(state, previous=state.current, current=self.step, change=change)

    def tells(self, found: Mapping[str, Found]) -> list[Hold | Route]:
        """Who has to be told what. Told again, nobody does anything twice."""
        tells: list[Hold | Route] = []
        for name, part in found.items():
            if part.held is not None and part.held.order != self.state.revision:
                tells.append(Hold(name, self.state.revision, self.slots_of(part_number(name))))
        return tells + [Route(name, self.state.current) for name in self._behind(found)]

    def progress(self, found: Mapping[str, Found]) -> object:
        """Changes whenever a step gets nearer to its commit. None: nothing is prepared."""
        if self.step is None:
            return None
        parts = {shard_name(number): found.get(shard_name(number)) for number in self.gains}
        held = {name: part.held for name, part in parts.items() if part is not None and part.held is not None}
        return self.state.revision, {name: (seen.order, seen.missing, seen.links) for name, seen in held.items()}

    def waits_for(self, found: Mapping[str, Found]) -> str:
        """Who keeps the change from going on, and why; empty if nobody does."""
        waiting = self._waiting_routers(found) if self.state.previous is not None else self._waiting_shards(found)
        return "; ".join(f"{name} {reason}" for name, reason in waiting.items())

    def _behind(self, found: Mapping[str, Found]) -> list[str]:
        """The routers that answer and do not route the current placement yet."""
        epoch = self.state.current.epoch
        return [name for name, part in found.items() if part.epoch is not None and part.epoch != epoch]

    def _waiting_routers(self, found: Mapping[str, Found]) -> dict[str, str]:
        """Routers that may still route the placement before, and how that is known."""
        waiting = dict.fromkeys(self._behind(found), "has steps under way by the placement before")
        shards = [part for name, part in found.items() if name.startswith("shard-") and part.node is not None]
        all_answer = all(part.held is not None for part in shards)
        linked = {router for part in shards if part.held is not None for router in part.held.links}
        for name, part in found.items():
            is_silent = name.startswith("router-") and part.epoch is None and part.node is not None
            if is_silent and (name in linked or not all_answer):
                waiting[name] = "does not answer, and may still be linked to shards"
        return waiting

    def _waiting_shards(self, found: Mapping[str, Found]) -> dict[str, str]:
        """Shards that are not ready for the step."""
        routers = {name for name, part in found.items() if part.epoch is not None and part.is_ready}
        waiting = {}
        for number, slots in self.gains.items():
            name = shard_name(number)
            held = found[name].held if name in found else None
            if held is None:
                waiting[name] = "does not answer"
            elif held.order != self.state.revision:
                waiting[name] = f"is to be told of {len(slots)} more experts"
            elif held.missing:
                waiting[name] = f"has {held.missing} experts to read" + (f": {held.problem}" if held.problem else "")
            elif unlinked := routers - held.links:
                waiting[name] = f"is not linked to {', '.join(sorted(unlinked))} yet"
        return waiting

    def _problem(self, found: Mapping[str, Found], drained: Set[str]) -> str:
        """Why the step cannot be made; empty if it can."""
        target = self.state.change.target if self.state.change is not None else None
        for placement in (self.step, target):
            if placement is not None and (reason := _only_on(drained, placement)):
                return reason
        for name in map(shard_name, self.gains):
            if name in drained:
                return f"{name} is drained"
            held = found[name].held if name in found else None
            if held is not None and held.order == self.state.revision and held.failures >= FAILURES:
                return f"{name}: {held.problem}"
        return ""


def _only_on(drained: Set[str], placement: Placement) -> str:
    """Which expert would be on drained shards alone; empty if none would."""
    numbers = {part_number(name) for name in drained if name.startswith("shard-")}
    for layer, by_expert in placement.shards_of.items() if numbers else ():
        for expert, shards in enumerate(by_expert):
            if numbers.issuperset(shards):
                return f"expert {expert} of layer {layer} would be on {shard_name(shards[0])} alone, which is drained"
    return ""


def recovered(initial: Placement, routed: Collection[Placement], revision: int) -> PlacementState:
    """The state when nothing is stored. routed: by the routers that answer, steps under way included.

    No more than two of them differ: the next step begins once all route the same. revision: higher
    than any before, such as the time in ms. Else a shard might take new orders for those that it has.
    """
    newest = max((initial, *routed), key=lambda placement: placement.epoch)
    older = [placement for placement in routed if placement.epoch < newest.epoch]
    return PlacementState(revision, newest, previous=max(older, key=lambda placement: placement.epoch, default=None))


def begin(plan: Plan, change: Change, shards: Set[str], drained: Set[str] = frozenset()) -> tuple[PlacementState, str]:
    """The state with the change under way, or why it cannot be.

    A change that is under way already goes on. shards: all of the deployment. drained: those that
    are to be gone.
    """
    state, running = plan.state, plan.state.change
    if running is not None:
        if running.operation_id != change.operation_id:
            return state, f"operation {running.operation_id} ({running.kind}) is under way; wait for it, or abort it"
        if not same_slots(running.target, change.target):
            return state, f"operation {running.operation_id} is under way to another target; wait for it, or abort it"
        return state, ""
    refusal = objection(change.target, state.current, plan.slots, {part_number(name) for name in shards})
    gaining = {shard_name(number) for number in gains(state.current, change.target)} if not refusal else set()
    if gone := sorted(gaining & drained):
        refusal = f"{gone[0]} is drained, and the target gives it more experts; undo the drain, or leave it out"
    elif not refusal and (lonely := _only_on(drained, change.target)):
        refusal = f"{lonely}; undo the drain, or give the expert another shard"
    if refusal:
        return state, refusal
    if same_slots(state.current, change.target):
        return _next(state, ended=_ended(change, "done")), ""
    return _next(state, change=change), ""


def abort(state: PlacementState, operation_id: str, reason: str = "as was asked for") -> tuple[PlacementState, str]:
    """The state without the change, or why there is nothing to abort. What was committed stays."""
    running = state.change
    if running is None:
        return state, f"operation {operation_id} is not under way; none is"
    if running.operation_id != operation_id:
        return state, f"operation {operation_id} is not under way; {running.operation_id} ({running.kind}) is"
    return _next(state, change=None, ended=_ended(running, f"aborted: {reason}")), ""


def _next(state: PlacementState, **changes: object) -> PlacementState:
    following: PlacementState = replace(state, revision=state.revision + 1, **changes)  # type: ignore[arg-type]
    return following


def _ended(change: Change, outcome: str) -> Ended:
    return Ended(change.operation_id, change.kind, outcome, change.steps_done, change.moved_bytes)

"""A resize from its start to its end, with Ray's part played: also when its controller is killed at any look."""

from dataclasses import replace
from typing import Any

import pytest

from cluster.actors import desired as desired_module
from cluster.actors.desired import Desired, View
from cluster.actors.resizing import Outside, Resizing
from cluster.events import EventLog
from cluster.policy.change import Change, PlacementState, Plan, abort, begin
from cluster.policy.reconcile import Create, Forget, Kill, Tell, reconcile
from cluster.policy.wanted import Found, Orders, Resize, Wanted, forgotten
from cluster.reports import OperationStatus
from cluster.stored_wanted import from_json, to_json
from experts.placement import Placement, even_placement
from tests.cluster.policy.test_reconcile import running

SLOTS = 5
BEGUN_WITH = Wanted(("router-0",), ("shard-0", "shard-1"), even_placement([0, 1], 6, 2))


class Moves:
    """Placements without shards that load: a step is ready as soon as its shards exist."""

    def __init__(self, found: dict[str, Found]) -> None:
        self.state = PlacementState(1, BEGUN_WITH.placement)
        self._found = found
        self.fails = ""

    def change(self, operation_id: str, target: Placement, kind: str) -> str:
        shards = {name for name in self._found if name.startswith("shard-")} | {"shard-2", "shard-3"}
        self.state, refusal = begin(self._plan, Change(operation_id, target, kind), shards)
        return refusal

    def abort(self, operation_id: str) -> str:
        self.state, refusal = abort(self.state, operation_id)
        return refusal

    def operation(self) -> OperationStatus | None:
        change = self.state.change
        return None if change is None else OperationStatus(change.operation_id, change.kind, "prepare")

    def step(self) -> None:
        change, plan = self.state.change, self._plan
        if change is not None and self.fails:
            self.state = abort(self.state, change.operation_id)[0]
            assert self.state.ended is not None
            self.state = replace(self.state, ended=replace(self.state.ended, outcome=f"aborted: {self.fails}"))
        elif self.state.previous is not None or plan.step is None:
            self.state = plan.next_state({})
        elif all(f"shard-{shard}" in self._found for shard in plan.gains):
            self.state = plan.next_state({})
            if self.state.previous is None:  # its shards answer nobody here
                self.state = replace(self.state, current=plan.step, previous=self.state.current)

    @property
    def _plan(self) -> Plan:
        return Plan(self.state, SLOTS)


class Factory:
    with_bundles = frozenset({*BEGUN_WITH.parts})

    @property
    def needs_of_new(self) -> dict[str, dict[str, float]]:
        return {"router": {"CPU": 1.0}, "shard": {"CPU": 1.0}}


class Scene:
    """A deployment whose parts do as they are told at once."""

    def __init__(self) -> None:
        self.found = running(BEGUN_WITH)
        self.moves = Moves(self.found)
        self.events = EventLog()
        self.free = {"a": {"CPU": 8.0}}
        self.frontends = 1
        self.outside = Outside(lambda wanted: self.free, lambda: False, self._scale)
        self.start_controller()

    def start_controller(self) -> None:
        self.desired = Desired("namespace", BEGUN_WITH)
        self.resizing = Resizing(  # type: ignore[arg-type]
            self.desired, self, Factory(), self.moves, self.events, SLOTS, 30.0, self.outside
        )
        self._note_placement()

    def look(self) -> dict[str, Found]:
        return dict(self.found)

    def _note_placement(self) -> None:
        state = self.moves.state
        others = [state.previous, state.change.target if state.change is not None else None]
        changing = {shard for placement in others if placement is not None for shard in placement.used_shards}
        wanted = replace(self.desired.wanted, placement=state.current, changing=frozenset(changing))
        self.desired.want_unstored(wanted)

    def _scale(self, count: int) -> bool:
        was, self.frontends = self.frontends, count
        return was == count

    def resize(self, operation_id: str = "op", **counts: Any) -> str:
        return self.resizing.begin(Resize(operation_id, **counts))

    def step(self) -> None:
        """What the controller does at one look, and what comes of it."""
        wanted = self.desired.wanted
        found = self.look()
        for name, part in found.items():
            self.found[name] = replace(part, is_ready=True, is_idle=True)
        for action in reconcile(wanted, found):
            match action:
                case Create(part):
                    self.found[part] = Found("b", is_ready=False, orders=Orders() if part in wanted.routers else None)
                case Tell(router, orders):
                    self.found[router] = replace(self.found[router], orders=orders)
                case Kill(part):
                    del self.found[part]
                case Forget(part):
                    self.desired.want(forgotten(part, self.desired.wanted))
        self.resizing.look(View(self.desired.wanted, found))
        self.moves.step()
        self._note_placement()

    def until_over(self, operation_id: str = "op", *, restarts: bool = False) -> OperationStatus:
        for _ in range(60):
            ended = self.events.operation(operation_id)
            if ended is not None:
                return ended
            if restarts:
                self.start_controller()
            self.step()
        raise AssertionError(self.resizing.status(View(self.desired.wanted, self.found)))


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    store: dict[str, str] = {}

    def read(namespace: str, begun_with: Wanted) -> tuple[Wanted, frozenset[str]]:
        return from_json(store[namespace], begun_with) if store else (begun_with, frozenset())

    def write(namespace: str, wanted: Wanted, moved: frozenset[str]) -> None:
        store[namespace] = to_json(wanted, moved)

    monkeypatch.setattr(desired_module, "read_wanted", read)
    monkeypatch.setattr(desired_module, "write_wanted", write)
    return Scene()


@pytest.mark.parametrize("restarts", [False, True])
def test_parts_come_and_go_again_whoever_is_killed(scene: Scene, restarts: bool) -> None:
    assert scene.resize("up", shards=3, routers=2, frontends=2) == ""
    assert scene.until_over("up", restarts=restarts).phase == "done"
    assert {*scene.found} == {"router-0", "router-1", "shard-0", "shard-1", "shard-2"}
    assert scene.moves.state.current.used_shards == {0, 1, 2}
    assert scene.frontends == 2
    assert scene.resize("down", shards=2, routers=1) == ""
    assert scene.until_over("down", restarts=restarts).phase == "done"
    assert {*scene.found} == {*BEGUN_WITH.parts} == {*scene.desired.wanted.parts}
    assert scene.moves.state.current.used_shards == {0, 1}


def test_asked_again_it_goes_on_and_afterwards_it_is_done(scene: Scene) -> None:
    assert scene.resize(shards=3) == ""
    scene.step()
    assert scene.resize(shards=3) == ""
    assert "is under way as 3 shards" in scene.resize(shards=4)
    assert "operation op (3 shards) is under way" in scene.resize("other", shards=4)
    scene.until_over()
    assert scene.resize(shards=3) == ""
    assert scene.desired.wanted.resize is None


def test_an_ended_operation_does_not_answer_for_other_numbers(scene: Scene) -> None:
    assert scene.resize(shards=3) == ""
    scene.until_over()
    assert "op was resize to 3 shards and has ended; take another operation id" in scene.resize(shards=2)
    assert "has ended" in scene.resize(shards=3, routers=2)
    scene.events.ended(OperationStatus("by-load", "rebalance", "done"))
    assert "by-load was rebalance and has ended" in scene.resize("by-load", shards=2)
    assert scene.desired.wanted.resize is None


def test_a_look_that_fails_is_told(scene: Scene) -> None:
    def fails(count: int) -> bool:
        raise OSError("Serve does not answer")

    scene.outside = replace(scene.outside, scale_frontends=fails)
    scene.start_controller()
    assert scene.resize(frontends=2) == ""
    view = View(scene.desired.wanted, scene.look())
    with pytest.raises(OSError, match="Serve"):
        scene.resizing.look(view)
    status = scene.resizing.status(view)
    assert status is not None
    assert status.waits_for == "the last look failed: Serve does not answer"


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_what_was_aborted_leaves_what_was_before(scene: Scene, steps: int) -> None:
    assert scene.resize(shards=3, routers=2) == ""
    for _ in range(steps):
        scene.step()
    assert {*scene.found} > {*BEGUN_WITH.parts}
    assert scene.resizing.abort("op") == ""
    ended = scene.until_over()
    assert (ended.phase, ended.reason) == ("aborted", "as was asked for")
    assert {*scene.found} == {*BEGUN_WITH.parts} == {*scene.desired.wanted.parts}
    assert scene.moves.state.current.used_shards == {0, 1}
    assert "op was aborted: as was asked for" in scene.resize(shards=3)


def test_a_shard_that_cannot_read_its_experts_ends_the_operation_and_nothing_else(scene: Scene) -> None:
    scene.moves.fails = "shard-2: its file is damaged"
    assert scene.resize(shards=3) == ""
    ended = scene.until_over()
    assert (ended.phase, ended.reason) == ("aborted", "shard-2: its file is damaged")
    assert {*scene.found} == {*BEGUN_WITH.parts} == {*scene.desired.wanted.parts}


def test_it_waits_for_another_change_and_says_so(scene: Scene) -> None:
    other = even_placement([0, 1], 6, 2, replicas=1)
    swapped = replace(other, shards_of={layer: experts[::-1] for layer, experts in other.shards_of.items()})
    assert scene.moves.change("auto-1", swapped, "rebalance") == ""
    assert scene.resize(shards=3) == ""
    scene.resizing.look(View(scene.desired.wanted, scene.look()))
    status = scene.resizing.status(View(scene.desired.wanted, scene.found))
    assert status is not None
    assert "operation auto-1 (rebalance) is under way; shard-2 is being created" in status.waits_for
    assert scene.until_over().phase == "done"


def test_a_refusal_changes_nothing(scene: Scene) -> None:
    scene.free = {}
    assert "no other node has room for shard-2" in scene.resize(shards=3)
    assert scene.desired.wanted == BEGUN_WITH

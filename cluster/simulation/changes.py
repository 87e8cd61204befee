"""Changes of the placement in a simulated deployment: the controller's own state machine, and shards that load.

Each look asks what shards hold and what routers route, and acts on it, as the live controller does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from cluster.part_names import part_number, shard_name
from cluster.policy.change import Change, Hold, PlacementState, Plan, begin
from cluster.policy.wanted import Found, Held
from cluster.simulation.scenario import Scenario
from experts.placement import Placement, Slot

LOOK_S, CHANGE_S = 1.0, 0.4
"""Time between two looks of the controller, WATCH_S and CHANGE_S there: without a change, and amid one."""


@dataclass
class SimulatedShard:
    """What a shard holds, and what it was told to. order: the number of what it was told.

    missing: slots that it loads now, one after the other since began_s. loads: counts the orders to
    load; an older one has no effect.
    is_running: its process is there. has_all: it has loaded all that it must before routers ask it.
    """

    number: int
    held: dict[Slot, int] = field(default_factory=dict)
    order: int = 0
    missing: dict[Slot, int] = field(default_factory=dict)
    began_s: float = 0.0
    loads: int = 0
    is_running: bool = True
    has_all: bool = True


class RouterEnd(Protocol):
    """What a change needs of a router. epoch: of the placement that all its steps use."""

    name: str

    @property
    def epoch(self) -> int: ...

    def route(self, placement: Placement) -> None:
        """Go by this placement from the next step on."""
        ...


class World(Protocol):
    """What changes need of the simulation."""

    now_s: float

    def at(self, time_s: float, call: Callable[[], None]) -> None: ...

    def shards_changed(self) -> None:
        """A shard has come or gone, or loads, or does not any more."""
        ...


class Changes:
    """The state of the placement, and what makes it so. routers: those that there are at a time."""

    def __init__(
        self, scenario: Scenario, placement: Placement, world: World, routers: Callable[[], Sequence[RouterEnd]]
    ) -> None:
        self._scenario, self._world, self._routers = scenario, world, routers
        self.state = PlacementState(1, placement)
        self.shards = {
            number: SimulatedShard(number, placement.slots_of(number), order=1) for number in range(scenario.num_shards)
        }
        self.moved_bytes = 0
        """Read into shards since the start, those of restarted ones included."""

    @property
    def loading(self) -> set[int]:
        """Shards that read weights now."""
        return {number for number, shard in self.shards.items() if shard.missing}

    @property
    def living(self) -> set[int]:
        """Shards that routers ask."""
        return {number for number, shard in self.shards.items() if shard.is_running and shard.has_all}

    def start(self, operation_id: str, target: Placement, kind: str) -> str:
        """Want another placement. Returns why that cannot be; empty if it can."""
        change = Change(operation_id, target, kind)
        self.state, refusal = begin(self._plan, change, {shard_name(number) for number in self.shards})
        self.look()
        return refusal

    def add(self, number: int) -> None:
        """A new shard, whose process is there. It holds nothing yet."""
        self.shards[number] = SimulatedShard(number, order=self.state.revision)
        self._world.shards_changed()

    def remove(self, number: int) -> None:
        """A shard that no placement uses any more."""
        del self.shards[number]
        self._world.shards_changed()

    def look(self) -> None:
        """Go on as far as what is found allows, and tell those who have to know."""
        found = self._found()
        while (state := self._plan.next_state(found)) is not self.state:
            self.state = state
        for told in self._plan.tells(found):
            if isinstance(told, Hold):
                self._hold(self.shards[part_number(told.shard)], told.order, told.slots)
            else:
                next(each for each in self._routers() if each.name == told.router).route(told.placement)
        self._world.shards_changed()

    def dies(self, number: int) -> None:
        """A shard's process ends. Ray starts it again, and it loads all that it has to hold."""
        shard, costs = self.shards[number], self._scenario.costs.shard
        if not shard.is_running:
            return
        self._count_loaded(shard)
        shard.is_running = shard.has_all = False
        shard.held, shard.missing, shard.order = {}, {}, 0
        shard.loads += 1
        self._world.at(self._world.now_s + costs.restart_s, lambda: self._is_back(shard))
        self._world.shards_changed()

    @property
    def _plan(self) -> Plan:
        layers = self.state.current.shards_of
        return Plan(self.state, self._scenario.slots, dict.fromkeys(layers, self._scenario.model.expert_bytes))

    @property
    def _slot_s(self) -> float:
        """To load one slot."""
        return self._scenario.model.expert_bytes / (self._scenario.costs.shard.load_mb_s * 1e6)

    def _is_back(self, shard: SimulatedShard) -> None:
        shard.is_running = True
        self._hold(shard, self.state.revision, self._plan.slots_of(shard.number))

    def _found(self) -> dict[str, Found]:
        """As the controller would find the parts now."""
        routers = self._routers()
        links = frozenset(router.name for router in routers)
        found = {router.name: Found("node", epoch=router.epoch) for router in routers}
        for number, shard in self.shards.items():
            held = Held(shard.order, len(shard.missing), links=links) if shard.is_running else None
            found[shard_name(number)] = Found("node", held=held)
        return found

    def _hold(self, shard: SimulatedShard, order: int, slots: Mapping[Slot, int]) -> None:
        """Hold exactly these: let others go, and load what is missing, beside computing."""
        self._count_loaded(shard)
        shard.order = order
        shard.held = {slot: version for slot, version in shard.held.items() if slots.get(slot) == version}
        shard.missing = {slot: version for slot, version in slots.items() if slot not in shard.held}
        shard.began_s = self._world.now_s
        shard.loads += 1
        nth = shard.loads

        def is_loaded() -> None:
            if shard.loads == nth:
                self._count_loaded(shard)
                shard.has_all = True
                self._world.shards_changed()

        self._world.at(self._world.now_s + len(shard.missing) * self._slot_s, is_loaded)

    def _count_loaded(self, shard: SimulatedShard) -> None:
        """Put what has been loaded by now among what is held."""
        count = int((self._world.now_s - shard.began_s) / self._slot_s + 1e-6)
        loaded = dict(islice(shard.missing.items(), count))
        shard.held |= loaded
        shard.missing = {slot: version for slot, version in shard.missing.items() if slot not in loaded}
        self.moved_bytes += len(loaded) * self._scenario.model.expert_bytes

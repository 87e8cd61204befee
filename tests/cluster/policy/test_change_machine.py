"""A change of placement through deaths at every point: it ends, and no router ever asks for what was let go."""

from collections import Counter
from dataclasses import dataclass, field
from random import Random

import hypothesis.strategies as st
from hypothesis import given, settings

from cluster.policy.change import (
    COMMIT,
    PREPARE,
    RETIRE,
    Change,
    Hold,
    PlacementState,
    Plan,
    Route,
    abort,
    begin,
    recovered,
)
from cluster.policy.migration import same_slots
from cluster.policy.wanted import Found, Held
from experts.placement import Placement, Slot, uniform_placement
from tests.cluster.policy.test_migration import drawn_layer

SHARDS, EXPERTS, SLOTS = 3, 4, 3
NAMES = {f"shard-{number}" for number in range(SHARDS)}


def drawn(rng: Random) -> Placement:
    layers = {layer: drawn_layer(rng, EXPERTS, range(SHARDS), SLOTS - 1) for layer in (1, 3)}
    return uniform_placement(SHARDS, layers)


@dataclass
class Shard:
    """is_fresh: since its start it has not had all that a controller told it to hold."""

    wanted: dict[Slot, int]
    order: int = 0
    held: set[Slot] = field(default_factory=set)
    is_fresh: bool = True
    is_alive: bool = True
    can_read: bool = True
    failures: int = 0

    def hold(self, order: int, slots: dict[Slot, int]) -> None:
        if order >= self.order:
            self.order, self.wanted, self.failures = order, slots, 0
            self.held &= slots.keys()

    def load(self, count: int) -> None:
        if not self.is_alive:
            return
        for slot in list(self.wanted.keys() - self.held)[:count]:
            if not self.can_read:
                self.failures += 1
                return
            self.held.add(slot)
        self.is_fresh &= not self.order or bool(self.wanted.keys() - self.held)


@dataclass
class Router:
    """step: the placement of the step under way. is_excused: it may know what is too old, and nobody could tell it."""

    newest: Placement
    step: Placement | None = None
    is_alive: bool = True
    is_frozen: bool = False
    is_linked: bool = True
    is_excused: bool = False

    @property
    def epoch(self) -> int:
        return (self.step or self.newest).epoch

    def route(self, placement: Placement) -> None:
        if placement.epoch >= self.newest.epoch:
            self.newest, self.is_excused = placement, self.is_excused and self.step is not None


class Cluster:
    """Fakes of routers and shards, told by a controller that remembers nothing but what it stores."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.initial = drawn(rng)
        self.stored = PlacementState(1, self.initial)
        self.shards = {f"shard-{n}": Shard(self.initial.slots_of(n)) for n in range(SHARDS)}
        for shard in self.shards.values():
            shard.load(99)
            shard.is_fresh = False
        self.routers = {f"router-{n}": Router(self.initial) for n in range(2)}
        self.controller_lives = True
        self.on_the_way: list[Hold | Route] = []
        self.operations, self.starts = 0, 1
        self.seen: Counter[str] = Counter()
        self.drained: set[str] = set()
        self.was_forgotten = False
        self.asked: dict[int, tuple[Placement, dict[int, set[Slot]]]] = {}

    @property
    def plan(self) -> Plan:
        return Plan(self.stored, SLOTS)

    def found(self) -> dict[str, Found]:
        seen = {}
        linked = frozenset(name for name, router in self.routers.items() if router.is_alive and router.is_linked)
        for name, shard in self.shards.items():
            missing = len(shard.wanted.keys() - shard.held)
            held = Held(shard.order, missing, linked, "broken" if shard.failures else "", shard.failures)
            if name not in self.drained:
                seen[name] = Found("node", held=held) if shard.is_alive else Found(None, is_ready=False)
        for name, router in self.routers.items():
            epoch = router.epoch if router.is_alive and not router.is_frozen else None
            seen[name] = Found("node" if router.is_alive else None, epoch is not None, epoch=epoch)
        return seen

    def look(self, deeds: int | None = None) -> None:
        """A look of the controller. deeds: it is killed after so many; what was stored stays."""
        if not self.controller_lives:
            return
        found = self.found()
        self.seen[self.plan.phase(found)] += 1
        self.controller_lives = deeds is None
        if deeds == 0:
            return
        self.stored = self.plan.next_state(found, self.drained)
        tells = self.plan.tells(found)
        self.on_the_way += tells if deeds is None else tells[: deeds - 1]

    def kill_controller_amid_look(self) -> None:
        self.look(self.rng.randint(0, 4))

    def restart_controller(self) -> None:
        """Now and then, Ray's store has lost everything."""
        if not self.controller_lives and self.rng.random() < 0.2:
            self.starts, self.was_forgotten = self.starts + 1000, True
            answering = [router for router in self.routers.values() if router.is_alive and not router.is_frozen]
            routed = [placement for router in answering for placement in (router.newest, router.step or router.newest)]
            self.stored = recovered(self.initial, routed, self.starts)
            for router in self.routers.values():  # nobody could tell what those who did not answer route
                router.is_excused |= len(answering) < len(self.routers)
        self.controller_lives = True

    def deliver(self) -> None:
        """In any order, and late."""
        if not self.on_the_way:
            return
        tell = self.on_the_way.pop(self.rng.randrange(len(self.on_the_way)))
        if isinstance(tell, Hold):
            if self.shards[tell.shard].is_alive:
                self.shards[tell.shard].hold(tell.order, dict(tell.slots))
        elif self.routers[tell.router].is_alive:
            self.routers[tell.router].route(tell.placement)

    def deliver_all(self) -> None:
        while self.on_the_way:
            self.deliver()

    def load(self) -> None:
        self.one_shard().load(self.rng.randint(1, 6))

    def one_shard(self) -> Shard:
        return self.shards[f"shard-{self.rng.randrange(SHARDS)}"]

    def kill_shard(self) -> None:
        self.one_shard().is_alive = False

    def restart_shards(self) -> None:
        for number in range(SHARDS):
            name = f"shard-{number}"
            if self.shards[name].is_alive or name in self.drained:
                continue
            if self.controller_lives:
                self.shards[name] = Shard(self.plan.slots_of(number), self.stored.revision)
            else:
                self.shards[name] = Shard(self.routers["router-0"].newest.slots_of(number))

    def drain(self) -> None:
        """Accepted if others have all of its experts now. It goes at once, and for good."""
        number = self.rng.randrange(SHARDS)
        others = {n for n in range(SHARDS) if n != number and f"shard-{n}" not in self.drained}
        by_experts = self.stored.current.shards_of.values()
        if all(others.intersection(shards) for by_expert in by_experts for shards in by_expert):
            self.drained.add(f"shard-{number}")
            self.shards[f"shard-{number}"].is_alive = False

    def undrain(self) -> None:
        self.drained.clear()

    def break_disk(self) -> None:
        self.one_shard().can_read = False

    def mend_disks(self) -> None:
        for shard in self.shards.values():
            shard.can_read = True

    def one_router(self) -> Router:
        return self.routers[f"router-{self.rng.randrange(2)}"]

    def begin_or_end_step(self) -> None:
        router = self.one_router()
        if router.is_alive and not router.is_frozen:
            router.step = router.newest if router.step is None else None

    def kill_router(self) -> None:
        self.one_router().is_alive = False

    def restart_routers(self) -> None:
        for name, router in self.routers.items():
            if router.is_alive:
                continue
            others = [other for other in self.routers.values() if other.is_alive]
            newest = self.stored.current if self.controller_lives else others[0].newest if others else self.initial
            self.routers[name] = Router(newest, is_excused=not self.controller_lives)

    def freeze_router(self) -> None:
        self.one_router().is_frozen = True

    def give_up_frozen_routers(self) -> None:
        for router in self.routers.values():
            router.is_linked &= not router.is_frozen

    def thaw_routers(self) -> None:
        for router in self.routers.values():
            router.is_excused |= not router.is_linked
            router.is_frozen, router.is_linked = False, True

    def change(self) -> None:
        if not self.controller_lives:
            return
        running = self.stored.change
        change = Change(f"op-{self.operations}", drawn(self.rng), "rebalance")
        self.stored, refusal = begin(self.plan, change, NAMES, self.drained)
        assert refusal or running is None
        assert not refusal or running is not None or "drained" in refusal
        self.operations += not refusal

    def abort(self) -> None:
        if self.controller_lives and self.stored.change is not None:
            self.stored, refusal = abort(self.stored, self.stored.change.operation_id)
            assert refusal == ""

    def check(self) -> None:
        """Every shard that may be asked has what it is asked for, and nobody has more than fits."""
        for router in self.routers.values():
            if not router.is_alive or not router.is_linked or router.is_excused:
                continue
            for placement in (router.newest, router.step or router.newest):
                for number, asked in self.asked_of(placement).items():
                    shard = self.shards[f"shard-{number}"]
                    if shard.is_alive and shard.order:
                        assert asked <= shard.wanted.keys()
                        assert shard.is_fresh or asked <= shard.held
        if not self.was_forgotten:
            for by_expert in self.stored.current.shards_of.values():
                assert all(any(f"shard-{n}" not in self.drained for n in shards) for shards in by_expert)
        for shard in self.shards.values():
            assert max(Counter(layer for layer, _ in shard.wanted).values(), default=0) <= SLOTS

    def asked_of(self, placement: Placement) -> dict[int, set[Slot]]:
        """shard number -> what routers may ask it for."""
        if id(placement) not in self.asked:
            by_shard = {number: {*placement.slots_of(number)} for number in range(SHARDS)}
            self.asked[id(placement)] = placement, by_shard
        return self.asked[id(placement)][1]

    def end(self) -> None:
        """Everybody lives again: the change ends, and all is as its outcome says."""
        self.controller_lives, running = True, self.stored.change
        for _ in range(40):
            self.mend_disks()
            self.thaw_routers()
            self.restart_routers()
            self.restart_shards()
            for router in self.routers.values():
                router.step = None
            for shard in self.shards.values():
                shard.load(99)
            self.look()
            self.deliver_all()
        assert self.stored.is_settled
        for name in NAMES - self.drained:
            assert self.shards[name].held == self.stored.current.slots_of(int(name[-1])).keys()
        assert all(router.newest == self.stored.current for router in self.routers.values())
        if running is not None:
            ended = self.stored.ended
            assert ended is not None
            assert ended.operation_id == running.operation_id
            assert ended.outcome == "done" or ended.outcome.endswith((": broken", "drained"))
            assert ended.outcome != "done" or same_slots(self.stored.current, running.target)


OFTEN = ("look", "deliver", "deliver_all", "load", "load", "begin_or_end_step")
NOW_AND_THEN = (
    "change",
    "restart_controller",
    "restart_shards",
    "restart_routers",
    "thaw_routers",
    "mend_disks",
    "undrain",
)
SELDOM = ("kill_shard", "kill_router", "freeze_router", "give_up_frozen_routers", "break_disk", "abort",
          "kill_controller_amid_look")  # fmt: skip
SHARES = {**dict.fromkeys(OFTEN, 8.0), **dict.fromkeys(NOW_AND_THEN, 2.0), **dict.fromkeys(SELDOM, 0.4)}


@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_whoever_dies_the_change_ends_and_nobody_is_asked_for_what_was_let_go(seed: int) -> None:
    cluster = Cluster(Random(seed))
    for deed in cluster.rng.choices(list(SHARES), list(SHARES.values()), k=200):
        getattr(cluster, deed)()
        cluster.check()
    cluster.end()


def test_the_fakes_go_through_all_phases() -> None:
    cluster = Cluster(Random(0))
    for deed in cluster.rng.choices(list(SHARES), list(SHARES.values()), k=3000):
        getattr(cluster, deed)()
    assert min(cluster.seen[phase] for phase in (PREPARE, COMMIT, RETIRE)) > 5

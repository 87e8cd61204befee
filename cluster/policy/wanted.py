"""What a deployment wants, and what of it was found: the controller's data, on which policies decide."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace

from cluster.part_names import part_number
from experts.placement import Placement


@dataclass(frozen=True)
class Resize:
    """An operation that changes numbers of parts. None: that number stays as it is.

    replicas: copies of each expert. before: what to go back to if it is aborted. aborted: why, once
    it is; then it goes back.
    """

    operation_id: str
    shards: int | None = None
    routers: int | None = None
    replicas: int | None = None
    frontends: int | None = None
    before: "Before | None" = None
    aborted: str = ""

    @property
    def counts(self) -> dict[str, int]:
        """What it changes."""
        counts = {name: getattr(self, name) for name in ("shards", "routers", "replicas", "frontends")}
        return {name: count for name, count in counts.items() if count is not None}


@dataclass(frozen=True)
class Before:
    """What was wanted when an operation began."""

    routers: tuple[str, ...]
    shards: tuple[str, ...]
    replicas: int
    frontends: int


@dataclass(frozen=True)
class Wanted:
    """routers, shards: the parts of the deployment, in the order of their numbers.

    drained: parts that are to be gone. cleared: ids of nodes whose parts are to move elsewhere.
    released: parts that are to be gone and then forgotten; a shard only once it holds nothing.
    Each with its grace in seconds: how long the requests of a router there may go on.
    is_stopping: the whole deployment is about to end. changing: numbers of the shards that hold
    something before or after a change of placement which is under way. replicas: copies that each
    expert has at least. frontends: how many. resize: the operation that is under way.
    """

    routers: tuple[str, ...]
    shards: tuple[str, ...]
    placement: Placement
    drained: Mapping[str, float] = field(default_factory=dict)
    cleared: Mapping[str, float] = field(default_factory=dict)
    is_stopping: bool = False
    released: Mapping[str, float] = field(default_factory=dict)
    changing: frozenset[int] = frozenset()
    replicas: int = 1
    frontends: int = 1
    resize: Resize | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        return (*self.routers, *self.shards)

    @property
    def staying(self) -> frozenset[str]:
        """The parts that are neither drained nor released."""
        return frozenset(self.parts) - self.drained.keys() - self.released.keys()

    def may_leave(self, name: str) -> bool:
        """Whether the part is released, and holds nothing that would have to be moved first."""
        is_needed = name in self.shards and part_number(name) in self.placement.used_shards | self.changing
        return name in self.released and not is_needed


def forgotten(name: str, wanted: Wanted) -> Wanted:
    """What is wanted once a released part is gone."""
    return replace(
        wanted,
        routers=tuple(router for router in wanted.routers if router != name),
        shards=tuple(shard for shard in wanted.shards if shard != name),
        drained={part: grace_s for part, grace_s in wanted.drained.items() if part != name},
        released={part: grace_s for part, grace_s in wanted.released.items() if part != name},
    )


@dataclass(frozen=True)
class Orders:
    """What a router is told: the numbers of the shards to leave alone, and whether to refuse new requests.

    is_draining: another router takes them. is_stopping: nobody does. shard_names: the shards to keep
    links to.
    """

    is_draining: bool = False
    shards: frozenset[int] = frozenset()
    is_stopping: bool = False
    shard_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Held:
    """What a shard says of its slots.

    order: the newest that it follows. missing: slots that it has to read yet. failures: how often in
    a row it could not read one, and problem: why. links: the routers that it is linked to.
    """

    order: int
    missing: int
    links: frozenset[str]
    problem: str = ""
    failures: int = 0


@dataclass(frozen=True)
class Found:
    """A part that exists.

    node: the id of its node; None while Ray looks for one. is_ready: it has loaded. is_idle: no
    request or row is under way, as far as can be known. What is told of a router that does not answer
    is as it last answered.
    orders: those that a router follows; None for shards, and if it has never answered.
    draining_s: for how long a router has drained. open_requests: of a router.
    epoch: of the placement that a router's steps use, all of them; None if it does not answer.
    held: of a shard; None if it does not answer.
    can_go_home: it was moved out of its bundle of the placement group, Ray finds no node for it now,
    and the bundle is on a node that may be used.
    restarts: how often Ray has started it again. unlinked: of a router, the shards that it has no
    link to, and why.
    """

    node: str | None
    is_ready: bool = True
    is_idle: bool = False
    orders: Orders | None = None
    draining_s: float = 0.0
    open_requests: int = 0
    epoch: int | None = None
    held: Held | None = None
    can_go_home: bool = False
    restarts: int = 0
    unlinked: Mapping[str, str] = field(default_factory=dict)


def leaving(wanted: Wanted, found: Mapping[str, Found]) -> dict[str, float]:
    """The parts that exist and are to leave now, drained, released or on a cleared node: grace_s by name."""
    grace_s = {
        name: wanted.cleared[part.node] for name, part in found.items() if part.node and part.node in wanted.cleared
    }
    grace_s |= {name: wanted.released[name] for name in wanted.released if name in found and wanted.may_leave(name)}
    return grace_s | {name: wanted.drained[name] for name in wanted.drained if name in found}


def only_held_by(shard: int, placement: Placement, others: Set[int]) -> dict[int, list[int]]:
    """layer -> the experts that `shard` holds and none of `others` does."""
    lonely = {
        layer: [
            expert
            for expert, holders in enumerate(by_expert)
            if shard in holders and {*holders}.isdisjoint(others - {shard})
        ]
        for layer, by_expert in placement.shards_of.items()
    }
    return {layer: experts for layer, experts in lonely.items() if experts}


def can_stand_in(others: Set[str], name: str, wanted: Wanted) -> bool:
    """Whether the `others` can do all that the part does."""
    if name in wanted.routers:
        return bool({*wanted.routers} & others - {name})
    numbers = {part_number(shard) for shard in wanted.shards if shard in others}
    return not only_held_by(part_number(name), wanted.placement, numbers)

"""What a deployment wants, and what of it was found: the controller's data, on which policies decide."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace

from cluster.part_names import part_number
from experts.placement import Placement


@dataclass(frozen=True)
class Wanted:
    """routers, shards: the parts of the deployment; shards by number.

    drained: parts that are to be gone. cleared: ids of nodes whose parts are to move elsewhere.
    Each with its grace in seconds: how long the requests of a router there may go on.
    is_stopping: the whole deployment is about to end.
    """

    routers: tuple[str, ...]
    shards: tuple[str, ...]
    placement: Placement
    drained: Mapping[str, float] = field(default_factory=dict)
    cleared: Mapping[str, float] = field(default_factory=dict)
    is_stopping: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        return (*self.routers, *self.shards)

    def with_drains(self, drained: Mapping[str, float], cleared: Mapping[str, float]) -> "Wanted":
        """The same, with these drains."""
        return replace(self, drained=drained, cleared=cleared)


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
class Found:
    """A part that exists.

    node: the id of its node; None while Ray looks for one. is_ready: it has loaded. is_idle: no
    request or row is under way, as far as can be known. What is told of a router that does not answer
    is as it last answered.
    orders: those that a router follows; None for shards, and if it has never answered.
    draining_s: for how long a router has drained. open_requests: of a router.
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
    can_go_home: bool = False
    restarts: int = 0
    unlinked: Mapping[str, str] = field(default_factory=dict)


def leaving(wanted: Wanted, found: Mapping[str, Found]) -> dict[str, float]:
    """The parts that exist and are to leave, drained or on a cleared node: grace_s by name."""
    grace_s = {
        name: wanted.cleared[part.node] for name, part in found.items() if part.node and part.node in wanted.cleared
    }
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

"""From what is wanted and what was found to what must be done now."""

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.part_names import part_number
from cluster.policy.wanted import Found, Orders, Wanted, can_stand_in, leaving


@dataclass(frozen=True)
class Tell:
    """Give a router its orders."""

    router: str
    orders: Orders


@dataclass(frozen=True)
class Kill:
    """End a part for good; Ray must not restart it."""

    part: str


@dataclass(frozen=True)
class Create:
    """Start a part that does not exist, on no cleared node."""

    part: str


@dataclass(frozen=True)
class Forget:
    """Want a released part, which is gone, no more."""

    part: str


Action = Tell | Kill | Create | Forget


def reconcile(wanted: Wanted, found: Mapping[str, Found]) -> list[Action]:
    """The next actions. Repeated until it returns none, they make what is found what is wanted.

    Nothing is remembered between two calls, so an action that failed comes again.

    Example: shard-1 is drained. The first call returns [Tell("router-0", Orders(shards={1}))]. Once
    router-0 follows that and shard-1 is idle, it is [Kill("shard-1")]; then nothing, or, if shard-1
    was released instead, [Forget("shard-1")]. When shard-1 is no longer drained, it is
    [Create("shard-1"), Tell("router-0", Orders())].
    """
    leaves = leaving(wanted, found)
    goes = going(wanted, found)
    orders = _orders(wanted, found, goes)
    tells = [Tell(name, order) for name, order in orders.items() if found[name].orders not in (None, order)]

    def may_go(name: str) -> bool:
        part = found[name]
        if name in wanted.shards:
            return not tells and (part.is_idle or _is_alone(name, wanted))
        if part.orders not in (None, orders[name]):
            return False
        return part.is_idle or part.draining_s >= leaves[name] or _is_alone(name, wanted)

    absent = [name for name in wanted.parts if name not in found]
    gone = [name for name in absent if wanted.may_leave(name)]
    missing = [name for name in absent if name not in gone and name not in wanted.drained]
    homeless = (name for name, part in found.items() if part.can_go_home and name not in goes)
    kills = (*homeless, *(name for name in goes if may_go(name)))
    return [*map(Forget, gone), *map(Create, missing), *tells, *map(Kill, kills)]


def going(wanted: Wanted, found: Mapping[str, Found]) -> list[str]:
    """Those of the leaving parts whose turn it is.

    While parts move, ready ones stand in for them: of two shards with the same experts on a cleared
    node, one moves after the other. A part for which none ever could goes at once: its requests
    wait for it to come back elsewhere.
    """
    ready = {name for name, part in found.items() if part.is_ready}
    leaves = leaving(wanted, found)
    turn = [name for name in wanted.parts if name in leaves and _is_alone(name, wanted)]
    for name in wanted.parts:
        if name in leaves and name not in turn and can_stand_in(ready.difference(turn, {name}), name, wanted):
            turn.append(name)
    return turn


def _is_alone(name: str, wanted: Wanted) -> bool:
    """Whether the part is the only one that does what it does, also when all wanted parts run."""
    return not can_stand_in(wanted.staying - {name}, name, wanted)


def _orders(wanted: Wanted, found: Mapping[str, Found], goes: list[str]) -> dict[str, Orders]:
    """What each router that exists must follow. One that is alone serves until it is killed."""
    absent = frozenset(
        part_number(name) for name in wanted.shards if name in goes or name in wanted.drained or wanted.may_leave(name)
    )
    return {
        name: Orders(name in goes and not _is_alone(name, wanted), absent, wanted.is_stopping, wanted.shards)
        for name in wanted.routers
        if name in found
    }

"""Other numbers of parts: whether that can be, which parts come and go, and when it is done."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from cluster.part_names import part_number, router_name, shard_name
from cluster.policy.drain import NoRoom, Resources, new_nodes
from cluster.policy.migration import objection, same_slots
from cluster.policy.spread import spread
from cluster.policy.wanted import Before, Found, Resize, Wanted
from experts.placement import Placement

_OF_EXPERTS = frozenset({"shards", "replicas"})
"""The numbers for which experts move."""


@dataclass(frozen=True)
class Room:
    """What a resize must keep to.

    slots: of each shard, for each MoE layer. needs: what a new router and a new shard reserve in
    Ray. free: what is left on each node that may be used. can_grow: Ray's autoscaler adds nodes.
    reserved: parts for which a place is kept, as they were there before.
    """

    slots: int
    needs: Mapping[str, Resources]
    free: Mapping[str, Resources]
    can_grow: bool = False
    reserved: frozenset[str] = frozenset()


def begin(resize: Resize, wanted: Wanted, found: Mapping[str, Found], room: Room, grace_s: float) -> tuple[Wanted, str]:
    """What is wanted with the operation under way, or why it cannot be, with the number that does not fit.

    Asked for again while it runs, it goes on. grace_s: how long requests of a router that goes may
    go on.

    Example: 3 shards of 44 slots are asked for, and the model has 160 experts. The answer is "3
    shards hold 3 * 43 experts of a layer (one of their 44 slots is for moving), the model has 160; ...".
    """
    running = wanted.resize
    if running is not None:
        if running.operation_id != resize.operation_id:
            return wanted, f"operation {running.operation_id} ({described(running)}) is under way; wait, or abort it"
        if running.counts != resize.counts:
            return wanted, f"operation {running.operation_id} is under way as {described(running)}; wait, or abort it"
        return wanted, ""
    refusal = _impossible(resize, wanted, room)
    if refusal:
        return wanted, refusal
    before = Before(
        _staying(wanted.routers, wanted), _staying(wanted.shards, wanted), wanted.replicas, wanted.frontends
    )
    resized = _resized(replace(resize, before=before), wanted, found, grace_s)
    return resized, _no_place(resized, wanted, room) or _no_slots(resized, found, room)


def abort(wanted: Wanted, operation_id: str, reason: str, grace_s: float) -> tuple[Wanted, str]:
    """What is wanted once the operation is to go back, or why it cannot be aborted."""
    running = wanted.resize
    if running is None or running.operation_id != operation_id:
        return wanted, f"{operation_id} does not run" + (f"; {running.operation_id} does" if running else "")
    if running.aborted:
        return wanted, ""
    before = running.before
    assert before is not None
    kept = {*before.routers, *before.shards}
    released = {name: grace_s for name in wanted.staying if name not in kept}
    return (
        replace(
            wanted,
            routers=_ordered({*wanted.routers, *before.routers}),
            shards=_ordered({*wanted.shards, *before.shards}),
            released={name: grace for name, grace in wanted.released.items() if name not in kept} | released,
            replicas=before.replicas,
            frontends=before.frontends,
            resize=replace(running, aborted=reason),
        ),
        "",
    )


def target(wanted: Wanted, found: Mapping[str, Found], slots: int) -> Placement:
    """The placement for the shards that stay; the present one if it is right.

    So it is where the resize gives no number for shards or replicas: experts placed by load, or on
    drained shards, stay. So it is, too, while drains leave fewer shards than replicas.
    """
    nodes = {part_number(name): _node(name, found) for name in _staying(wanted.shards, wanted)}
    if not _moves_experts(wanted.resize) or len(nodes) < wanted.replicas:
        return wanted.placement
    changes_copies = wanted.resize is not None and wanted.resize.replicas is not None
    return spread(wanted.placement, nodes, wanted.replicas, slots, keep_extra=not changes_copies)


def waits_for(wanted: Wanted, found: Mapping[str, Found]) -> str:
    """Who keeps the operation from its end, but for the experts that have to move; empty if nobody does."""
    waiting = []
    for name in sorted(wanted.staying):
        part = found.get(name)
        if part is None:
            waiting.append(f"{name} is being created")
        elif part.node is None:
            waiting.append(f"{name} waits for a node")
        elif not part.is_ready:
            waiting.append(f"{name} is loading")
    staying = _staying(wanted.shards, wanted)
    if _moves_experts(wanted.resize) and len(staying) < wanted.replicas:
        drained = ", ".join(name for name in wanted.shards if name in wanted.drained)
        stays = f"{len(staying)} {'stays' if len(staying) == 1 else 'stay'}"
        waiting.append(f"{wanted.replicas} replicas wait for {wanted.replicas} shards, and {stays}: undrain {drained}")
    waiting += [f"{name} is to go" for name in sorted(wanted.released) if wanted.may_leave(name)]
    return "; ".join(waiting)


def described(resize: Resize) -> str:
    """The numbers that it asks for, such as "3 shards, 1 router"."""
    counts = resize.counts.items()
    return ", ".join(f"{count} {name if count != 1 else name.removesuffix('s')}" for name, count in counts)


def _impossible(resize: Resize, wanted: Wanted, room: Room) -> str:
    """Why the numbers cannot be, whatever room there is."""
    if not resize.counts:
        return "no number is given; give shards, routers, replicas or frontends"
    for name, count in resize.counts.items():
        if count < 1:
            return f"{name} is {count}; it must be at least 1"
    if not _moves_experts(resize):
        return ""
    layers = wanted.placement.shards_of
    shards = len(_staying(wanted.shards, wanted)) if resize.shards is None else resize.shards
    replicas = wanted.replicas if resize.replicas is None else resize.replicas
    if not layers:
        changed = min(_OF_EXPERTS & resize.counts.keys())
        return f"{changed} cannot be changed: this model is dense, without routed experts"
    experts = max(map(len, layers.values()))
    if shards > experts:
        return f"shards is {shards}; the model has {experts} experts, so it must be from 1 to {experts}"
    if replicas > shards:
        return f"replicas is {replicas}, and there would be {_shards(shards)}; each replica needs a shard of its own"
    if shards * (room.slots - 1) < experts * replicas:
        copies = f", each on {replicas} shards" if replicas > 1 else ""
        needed = f"{-(-experts * replicas // (room.slots - 1))}" if room.slots > 1 else "more"
        return (
            f"{_shards(shards)} hold{'s' if shards == 1 else ''} {shards} * {room.slots - 1} experts of a layer "
            f"(one of their {room.slots} slots is for moving), the model has {experts}{copies}; "
            f"{needed} shards would do, or a higher shards.slots"
        )
    return ""


def _moves_experts(resize: Resize | None) -> bool:
    return resize is not None and not _OF_EXPERTS.isdisjoint(resize.counts)


def _shards(count: int) -> str:
    return f"{count} shard{'' if count == 1 else 's'}"


def _no_place(resized: Wanted, wanted: Wanted, room: Room) -> str:
    """Why the new parts find no node."""
    new = {*resized.parts} - {*wanted.parts} - room.reserved
    if room.can_grow or not new:
        return ""
    try:
        new_nodes({name: room.needs["shard" if name in resized.shards else "router"] for name in new}, room.free)
    except NoRoom as error:
        return str(error)
    return ""


def _no_slots(resized: Wanted, found: Mapping[str, Found], room: Room) -> str:
    """Why the placement that would follow cannot be gone to."""
    placement = target(resized, found, room.slots)
    if same_slots(placement, resized.placement):
        return ""
    return objection(placement, resized.placement, room.slots, set(map(part_number, resized.shards)))


def _resized(resize: Resize, wanted: Wanted, found: Mapping[str, Found], grace_s: float) -> Wanted:
    routers, let_go = _of_kind(wanted.routers, resize.routers, router_name, wanted, found)
    shards, let_go_too = _of_kind(wanted.shards, resize.shards, shard_name, wanted, found)
    kept = {name: grace for name, grace in wanted.released.items() if name in let_go or name in let_go_too}
    new = {name: grace_s for name in (*let_go, *let_go_too) if name not in kept}
    return replace(
        wanted,
        routers=routers,
        shards=shards,
        released=kept | new,
        replicas=wanted.replicas if resize.replicas is None else resize.replicas,
        frontends=wanted.frontends if resize.frontends is None else resize.frontends,
        resize=resize,
    )


def _of_kind(
    names: tuple[str, ...],
    count: int | None,
    name_of: Callable[[int], str],
    wanted: Wanted,
    found: Mapping[str, Found],
) -> tuple[tuple[str, ...], frozenset[str]]:
    """The parts of one kind so that `count` of them stay, and those of them that are let go.

    A drained part counts for nothing, and stays drained. Released ones are taken back before new
    ones come; new ones get the lowest free numbers. Those that do not run go first, then the highest
    numbers.
    """
    released = {name for name in names if name in wanted.released}
    staying = [name for name in names if name in wanted.staying]
    if count is None:
        return names, frozenset(released)
    back = [name for name in names if name in released and name not in wanted.drained]
    while len(staying) < count and back:
        staying.append(back.pop(0))
    numbers = (number for number in range(len(names) + count) if name_of(number) not in names)
    new = [name_of(next(numbers)) for _ in range(count - len(staying))]
    by_worth = sorted(staying, key=lambda name: (name not in found, part_number(name)))
    let_go = by_worth[count:]
    return _ordered([*names, *new]), frozenset((released - {*staying}) | {*let_go})


def _staying(names: Iterable[str], wanted: Wanted) -> tuple[str, ...]:
    return tuple(name for name in names if name in wanted.staying)


def _ordered(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(names, key=part_number))


def _node(name: str, found: Mapping[str, Found]) -> str:
    return (found[name].node if name in found else None) or ""

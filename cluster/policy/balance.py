"""Measured load in, a better placement out, if it is worth the bytes.

For each layer some layouts are made: the present one improved by few steps, and new ones packed from
nothing, turned so that little moves. Each is worth the time that it saves, less the time that its
weights take to load. Survival comes first: every expert keeps its replicas on nodes of their own.

Legend: W windows, L layers, E experts, S usable shards.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from cluster.policy.alignment import aligned
from cluster.policy.improvement import improved, shed
from cluster.policy.layout import Bools, Floats, Ints, NoLayout, Rooms, repaired
from cluster.policy.load import Loads
from cluster.policy.packing import EXPONENTS, allotment, pack
from experts.placement import Placement

EXTRA_SHARES = (0.0, 0.25, 0.5, 1.0)
"""Of the free slots, how many a newly packed layout may fill."""
REFINED = 2
"""Newly packed layouts of a layer that are improved; the others only compete to be among these."""
MAX_STEPS = 100
"""Of improving one layout of one layer."""


@dataclass(frozen=True)
class ShardRoom:
    """A shard that may hold experts. slots: of each layer, the reserved ones included. node: where it runs."""

    number: int
    node: str
    slots: int
    is_usable: bool = True


@dataclass(frozen=True)
class BalanceSettings:
    """replicas: copies that every expert keeps. expert_bytes: of one expert's weights.

    bandwidth_bytes_s: how fast a shard loads them beside its work. horizon_s: for how long a
    placement is expected to be right. threshold: while the imbalance is no larger, nothing moves.
    min_gain: the share of the shards' time that a change must save. reserved_slots: of each shard
    and layer, kept free for changes. max_extra: copies beyond the replicas, over all layers; None:
    as many as there is room for.
    """

    replicas: int = 1
    expert_bytes: int = 1
    bandwidth_bytes_s: float = 200e6
    horizon_s: float = 300.0
    threshold: float = 1.1
    min_gain: float = 0.03
    reserved_slots: int = 1
    max_extra: int | None = None

    @property
    def load_s(self) -> float:
        """Seconds to load one expert."""
        return self.expert_bytes / self.bandwidth_bytes_s


@dataclass(frozen=True)
class Proposal:
    """placement: what is proposed, or the present one. imbalance: largest over mean load of the shards, averaged over
    layers. gain: share of the shards' time saved. gain_tok_s: rows per second and layer that they could compute more.
    copies: over all layers. is_accepted: whether to change to it; reason: why, in numbers.
    """

    placement: Placement
    imbalance_before: float
    imbalance_after: float
    moved_bytes: int
    gain: float
    gain_tok_s: float
    copies_before: int
    copies_after: int
    is_accepted: bool
    reason: str

    @property
    def only_sheds(self) -> bool:
        """It lets go of copies and loads none."""
        return self.moved_bytes == 0 and self.copies_after < self.copies_before


class _Option(NamedTuple):
    """A layout for a layer. cost: what its most loaded shard has to do, on average over windows."""

    held_ES: Bools
    cost: float
    moved: int
    copies: int


def propose(
    loads: Loads, current: Placement, shards: Sequence[ShardRoom], settings: BalanceSettings | None = None
) -> Proposal:
    """The placement to change to, and whether to.

    Accepted if an expert lacks copies; or if the imbalance is above the threshold, the gain at least
    min_gain, and the time saved within the horizon longer than loading takes; or if copies only go.

    Example: FlashLB's published one, 8 shards with 2 slots. The largest load was 600, and becomes
    200 of 181 on average; EPLB's is 232.

    >>> from experts.placement import even_placement
    >>> loads = Loads((0,), np.array([[[600.0, 560, 120, 120, 20, 10, 10, 10]]]))
    >>> shards = [ShardRoom(number, "", 2) for number in range(8)]
    >>> proposal = propose(loads, even_placement([0], 8, 8), shards, BalanceSettings(reserved_slots=0))
    >>> round(proposal.imbalance_before, 2), round(proposal.imbalance_after, 2), proposal.is_accepted
    (3.31, 1.1, True)
    """
    settings = settings or BalanceSettings()
    usable = [shard for shard in shards if shard.is_usable]
    if not usable or not loads.layers:
        return _unchanged(current, "no shard may be used" if loads.layers else "the model has no experts")
    nodes = sorted({shard.node for shard in usable})
    rooms = Rooms(
        np.array([shard.slots - settings.reserved_slots for shard in usable], np.int64),
        np.array([nodes.index(shard.node) for shard in usable], np.int64),
        settings.replicas,
    )
    now_LES = _held(current, loads.layers, [shard.number for shard in usable])
    mean_LE = loads.mean_LE
    try:
        start_LES = np.stack([repaired(now_ES, mean_E, rooms) for now_ES, mean_E in zip(now_LES, mean_LE, strict=True)])
    except NoLayout as error:
        return _unchanged(current, str(error))
    is_broken = bool((start_LES != now_LES).any()) or _holds_elsewhere(current, {shard.number for shard in usable})
    chosen_LES = _choose(loads, now_LES, start_LES, rooms, settings)
    return _judged(loads, current, now_LES, start_LES, chosen_LES, usable, is_broken, settings)


def imbalance_of(loads: Loads, placement: Placement, shards: Sequence[ShardRoom]) -> float:
    """Largest over mean load of the shards, window by window, averaged over the layers that have any.

    >>> from experts.placement import even_placement
    >>> loads = Loads((0,), np.array([[[3.0, 1.0]]]))
    >>> imbalance_of(loads, even_placement([0], 2, 2), [ShardRoom(0, "", 2), ShardRoom(1, "", 2)])
    1.5
    """
    numbers = [shard.number for shard in shards if shard.is_usable]
    if not numbers or not loads.layers:
        return 1.0
    return _imbalance(_held(placement, loads.layers, numbers), loads.rows_WLE.transpose(1, 0, 2))


def _held(placement: Placement, layers: Sequence[int], numbers: Sequence[int]) -> Bools:
    """held_LES: what these shards hold."""
    index_of = {number: index for index, number in enumerate(numbers)}
    held_LES = np.zeros((len(layers), len(placement.shards_of[layers[0]]), len(numbers)), np.bool_)
    for index, layer in enumerate(layers):
        for expert, holders in enumerate(placement.shards_of[layer]):
            held_LES[index, expert, [index_of[number] for number in holders if number in index_of]] = True
    return held_LES


def _holds_elsewhere(placement: Placement, usable: set[int]) -> bool:
    return any(not usable.issuperset(of) for by_expert in placement.shards_of.values() for of in by_expert)


def _choose(loads: Loads, now_LES: Bools, start_LES: Bools, rooms: Rooms, settings: BalanceSettings) -> Bools:
    """chosen_LES: of each layer's options that of the best value, within the budget of copies."""
    mean_LE, rows_LWE = loads.mean_LE, loads.rows_WLE.transpose(1, 0, 2)
    cost_L = [_cost(held_ES, rows_WE) for held_ES, rows_WE in zip(start_LES, rows_LWE, strict=True)]
    price = sum(cost_L) * settings.load_s / settings.horizon_s
    budget = None if settings.max_extra is None else settings.max_extra + mean_LE.size * rooms.least_copies
    busy = np.flatnonzero(mean_LE.sum(axis=1) > 0)
    packed = _packed(rows_LWE[busy], rooms, by_extra=budget is not None)
    menus = []
    for layer, rows_WE in enumerate(rows_LWE):
        now_ES, start_ES, mean_E = now_LES[layer], start_LES[layer], mean_LE[layer]
        layouts = [start_ES]
        if layer in busy:
            goal = 1.0 + (settings.threshold - 1.0) / 2
            fresh = [aligned(held_ES, now_ES, rooms) for held_ES in packed[int(np.searchsorted(busy, layer))]]
            for begin_ES in (start_ES, *fresh):
                better_ES = improved(begin_ES, now_ES, mean_E, rooms, price, MAX_STEPS, may_add=budget is None)
                layouts.append(shed(better_ES, now_ES, mean_E, rooms, goal))
            layouts.append(shed(start_ES, now_ES, mean_E, rooms, goal))
        menus.append([_option(held_ES, now_ES, rows_WE) for held_ES in layouts])
    worth = [_worthwhile(menu, settings.min_gain, price) for menu in menus]
    return np.stack([option.held_ES for option in _within_budget(worth, price, budget)])


def _option(held_ES: Bools, now_ES: Bools, rows_WE: Floats) -> _Option:
    return _Option(held_ES, _cost(held_ES, rows_WE), int((held_ES & ~now_ES).sum()), int(held_ES.sum()))


def _cost(held_ES: Bools, rows_WE: Floats) -> float:
    """What the most loaded shard has to do, window by window, on average."""
    shares_WE = rows_WE / np.maximum(held_ES.sum(axis=1), 1)
    return float((shares_WE @ held_ES.astype(np.float64)).max(axis=1).mean())


def _packed(rows_LWE: Floats, rooms: Rooms, *, by_extra: bool) -> list[list[Bools]]:
    """For each layer the best newly packed layouts, of several allotments of copies.

    by_extra: the best of each number of copies, instead of the best of all.
    """
    if not len(rows_LWE):
        return []
    num_experts, most = rows_LWE.shape[2], len(rooms.slots_S)
    free = int(rooms.slots_S.sum()) - num_experts * rooms.least_copies
    extras = sorted({int(free * share) for share in EXTRA_SHARES})
    tries = [(extra, exponent) for extra in extras for exponent in (EXPONENTS if extra else EXPONENTS[:1])]
    layer_B, copies_BE = [], []
    for layer, rows_WE in enumerate(rows_LWE):
        mean_E = rows_WE.mean(axis=0)
        for extra, exponent in tries:
            layer_B.append(layer)
            copies_BE.append(allotment(mean_E, extra, exponent, rooms.least_copies, most))
    held_BES = pack(rows_LWE, layer_B, np.array(copies_BE), rooms)
    by_layer = []
    for layer, rows_WE in enumerate(rows_LWE):
        made = held_BES[layer * len(tries) : (layer + 1) * len(tries)]
        ranked = sorted(zip(made, tries, strict=True), key=lambda pair: _cost(pair[0], rows_WE))
        if by_extra:
            best = list({extra: held_ES for held_ES, (extra, _) in reversed(ranked)}.values())
        else:
            best = [held_ES for held_ES, _ in ranked[:REFINED]]
        by_layer.append([repaired(held_ES, rows_WE.mean(axis=0), rooms) for held_ES in best])
    return by_layer


def _worthwhile(menu: list[_Option], min_gain: float, price: float) -> list[_Option]:
    """The first option, which is the present layout, and those that save enough, or that only let go of copies."""
    stay = menu[0]
    worth = [
        option
        for option in menu[1:]
        if (stay.cost - option.cost > min_gain * stay.cost and _value(option, price) > _value(stay, price))
        or (option.moved <= stay.moved and option.copies < stay.copies)
    ]
    return [stay, *worth]


def _value(option: _Option, price: float) -> float:
    return -option.cost - price * option.moved


def _within_budget(menus: Sequence[Sequence[_Option]], price: float, budget: int | None) -> list[_Option]:
    """One option of each layer: slots are a budget, and go where a copy is worth most (CRAFT, arXiv 2603.28768).

    Begins with the fewest copies everywhere. Then, again and again, that layer is changed whose
    value rises most for each copy more.
    """
    if budget is None:
        return [max(menu, key=lambda option: (_value(option, price), -option.copies)) for menu in menus]
    chosen = [min(menu, key=lambda option: (option.copies, -_value(option, price))) for menu in menus]
    while True:
        left = budget - sum(option.copies for option in chosen)
        best, index_of_best, rate = None, -1, 0.0
        for index, menu in enumerate(menus):
            for option in menu:
                more = option.copies - chosen[index].copies
                rises = _value(option, price) - _value(chosen[index], price)
                if more <= left and rises > 0 and rises / max(more, 1) > rate:
                    best, index_of_best, rate = option, index, rises / max(more, 1)
        if best is None:
            return chosen
        chosen[index_of_best] = best


def _judged(
    loads: Loads, current: Placement, now_LES: Bools, start_LES: Bools, chosen_LES: Bools, usable: Sequence[ShardRoom],
    is_broken: bool, settings: BalanceSettings,
) -> Proposal:  # fmt: skip
    rows_LWE, mean_LE = loads.rows_WLE.transpose(1, 0, 2), loads.mean_LE

    def cost(held_LES: Bools) -> float:
        return sum(_cost(held_ES, rows_WE) for held_ES, rows_WE in zip(held_LES, rows_LWE, strict=True))

    before, after = _imbalance(start_LES, rows_LWE), _imbalance(chosen_LES, rows_LWE)
    cost_before, cost_after = cost(start_LES), cost(chosen_LES)
    gain = 1.0 - cost_after / cost_before if cost_before > 0 else 0.0
    moved, rate = int((chosen_LES & ~now_LES).sum()), float(mean_LE.sum(axis=1).mean())
    proposal = Proposal(
        placement=current, imbalance_before=before, imbalance_after=after, moved_bytes=moved * settings.expert_bytes,
        gain=gain, gain_tok_s=rate * (cost_before / cost_after - 1.0) if cost_after else 0.0,
        copies_before=int(now_LES.sum()), copies_after=int(chosen_LES.sum()), is_accepted=False, reason="",
    )  # fmt: skip
    saved_s, load_s = gain * settings.horizon_s, moved * settings.load_s
    facts = (
        f"imbalance {before:.2f} -> {after:.2f}, gain {gain:.1%} or {saved_s:.1f} s of {settings.horizon_s:.0f} s, "
        f"{moved} experts or {load_s:.1f} s to load, copies {proposal.copies_before} -> {proposal.copies_after}"
    )
    if is_broken:
        accepted, why = True, "experts lack copies where they may be"
    elif (chosen_LES == now_LES).all():
        accepted, why = False, "no change pays"
    elif proposal.only_sheds:
        accepted, why = True, "some copies bring nothing"
    elif before <= settings.threshold:
        accepted, why = False, f"the imbalance is not above {settings.threshold:g}"
    elif gain < settings.min_gain:
        accepted, why = False, f"the gain is less than {settings.min_gain:.1%}"
    elif saved_s <= load_s:
        accepted, why = False, "loading takes longer than it saves"
    else:
        accepted, why = True, "it pays"
    if not accepted:
        return replace(proposal, reason=f"{why}: {facts}")
    placement = _placement(current, loads.layers, chosen_LES, [shard.number for shard in usable])
    return replace(proposal, placement=placement, is_accepted=True, reason=f"{why}: {facts}")


def _imbalance(held_LES: Bools, rows_LWE: Floats) -> float:
    """Largest over mean load of the shards, window by window, averaged over the layers that have any."""
    num_shards = held_LES.shape[2]
    of_layers = [
        _cost(held_ES, rows_WE) * num_shards / rows_WE.sum(axis=1).mean()
        for held_ES, rows_WE in zip(held_LES, rows_LWE, strict=True)
        if rows_WE.any()
    ]
    return float(np.mean(of_layers)) if of_layers else 1.0


def _placement(current: Placement, layers: Sequence[int], held_LES: Bools, numbers: Sequence[int]) -> Placement:
    """Who had an expert before stays in front; the others follow in a turn that differs by expert."""
    shards_of = dict(current.shards_of)
    for layer, held_ES in zip(layers, held_LES, strict=True):
        shards_of[layer] = tuple(
            _in_order(current.shards_of[layer][expert], np.flatnonzero(held_S), expert, numbers)
            for expert, held_S in enumerate(held_ES)
        )
    num_shards = max(current.num_shards, max(numbers) + 1)
    return Placement(current.epoch + 1, num_shards, shards_of, current.versions_of)


def _in_order(before: tuple[int, ...], held: Ints, expert: int, numbers: Sequence[int]) -> tuple[int, ...]:
    now = {numbers[index] for index in held}
    stay = [number for number in before if number in now]
    turned = sorted(now.difference(stay), key=lambda number: ((number + expert) % (max(numbers) + 1), number))
    return (*stay, *turned)


def _unchanged(current: Placement, reason: str) -> Proposal:
    copies = sum(len(shards) for by_expert in current.shards_of.values() for shards in by_expert)
    return Proposal(current, 1.0, 1.0, 0, 0.0, 0.0, copies, copies, False, reason)

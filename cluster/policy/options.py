"""What could be done with each layer, and which of it is done.

Legend: L layers, E experts, S usable shards, W windows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cluster.policy.alignment import aligned
from cluster.policy.improvement import improved, shed
from cluster.policy.layout import Bools, Floats, Rooms, repaired
from cluster.policy.load import Loads
from cluster.policy.packing import EXPONENTS, allotment, covariance, pack, risk_of_shards

EXTRA_SHARES = (0.0, 0.25, 0.5, 1.0)
"""Of the free slots, how many a newly packed layout may fill."""
REFINED = 2
"""Newly packed layouts of a layer that are improved; the others only compete to be among these."""
MAX_STEPS = 100
"""Of improving one layout of one layer."""


class LayerLoad(NamedTuple):
    """The load of a layer's experts over windows: mean, and covariance shrunk by what chance explains."""

    mean_E: Floats
    cov_EE: Floats


def load_by_layer(loads: Loads) -> list[LayerLoad]:
    return [LayerLoad(rows_WE.mean(axis=0), covariance(rows_WE)) for rows_WE in loads.rows_WLE.transpose(1, 0, 2)]


def cost_of(held_ES: Bools, load: LayerLoad) -> float:
    """What the most loaded shard has to do: mean + Z * deviation, which three of four windows do not exceed."""
    return float(risk_of_shards(held_ES, load.mean_E, load.cov_EE).max())


class Taste(NamedTuple):
    """price: of loading one expert, in units of load. goal: the imbalance up to which copies may be let go.

    min_gain: the share of a layer's cost that a change must save; as much may be given up for fewer
    copies. budget: copies of all layers together; None: as many as fit.
    """

    price: float
    goal: float
    min_gain: float
    budget: int | None


class _Option(NamedTuple):
    """A layout for a layer. copies: of all experts. value: what it is worth beside others, cost and loading."""

    held_ES: Bools
    cost: float
    moved: int
    copies: int
    value: float


def choose(load_L: Sequence[LayerLoad], now_LES: Bools, start_LES: Bools, rooms: Rooms, taste: Taste) -> Bools:
    """chosen_LES: of each layer's options the best one, within the budget of copies.

    now_LES: what is held. start_LES: the same, repaired where it may not stay so.
    """
    busy = [layer for layer, load in enumerate(load_L) if load.mean_E.any()]
    packed = dict(zip(busy, _packed([load_L[layer] for layer in busy], rooms, taste), strict=True))
    menus = []
    for layer, load in enumerate(load_L):
        now_ES, start_ES = now_LES[layer], start_LES[layer]
        layouts = [start_ES]
        if layer in packed:
            begin = [start_ES, *(aligned(held_ES, now_ES, rooms) for held_ES in packed[layer])]
            layouts += [
                improved(held_ES, now_ES, load.mean_E, rooms, taste.price, MAX_STEPS, may_add=taste.budget is None)
                for held_ES in begin
            ]
            layouts += [shed(held_ES, now_ES, load.mean_E, rooms, taste.goal) for held_ES in layouts]
        menus.append(_worthwhile([_option(held_ES, now_ES, load, taste.price) for held_ES in layouts], taste.min_gain))
    return np.stack([option.held_ES for option in _within_budget(menus, taste)])


def _option(held_ES: Bools, now_ES: Bools, load: LayerLoad, price: float) -> _Option:
    cost, moved = cost_of(held_ES, load), int((held_ES & ~now_ES).sum())
    return _Option(held_ES, cost, moved, int(held_ES.sum()), -cost - price * moved)


def _packed(load_L: Sequence[LayerLoad], rooms: Rooms, taste: Taste) -> list[list[Bools]]:
    """For each layer the best newly packed layouts, of several allotments of copies.

    With a budget it is the best of each number of copies, else the best of all.
    """
    if not load_L:
        return []
    num_experts, most = len(load_L[0].mean_E), len(rooms.slots_S)
    free = int(rooms.slots_S.sum()) - num_experts * rooms.least_copies
    extras = sorted({int(free * share) for share in EXTRA_SHARES})
    tries = [(extra, exponent) for extra in extras for exponent in (EXPONENTS if extra else EXPONENTS[:1])]
    copies_BE = [
        allotment(load.mean_E, extra, exponent, rooms.least_copies, most)
        for load in load_L
        for extra, exponent in tries
    ]
    layer_B = np.repeat(np.arange(len(load_L)), len(tries))
    mean_LE, cov_LEE = np.stack([load.mean_E for load in load_L]), np.stack([load.cov_EE for load in load_L])
    held_BES = pack(mean_LE, cov_LEE, layer_B, np.array(copies_BE), rooms)
    by_layer = []
    for layer, load in enumerate(load_L):
        made = zip(held_BES[layer * len(tries) : (layer + 1) * len(tries)], tries, strict=True)
        ranked = sorted(made, key=lambda pair: cost_of(pair[0], load))
        if taste.budget is None:
            best = [held_ES for held_ES, _ in ranked[:REFINED]]
        else:
            best = list({extra: held_ES for held_ES, (extra, _) in reversed(ranked)}.values())
        by_layer.append([repaired(held_ES, load.mean_E, rooms) for held_ES in best])
    return by_layer


def _worthwhile(menu: list[_Option], min_gain: float) -> list[_Option]:
    """The first option, which is the present layout, and those that save enough, or that only let go of copies."""
    stay = menu[0]
    worth = [
        option
        for option in menu[1:]
        if (stay.cost - option.cost > min_gain * stay.cost and option.value > stay.value)
        or (option.moved <= stay.moved and option.copies < stay.copies)
    ]
    return [stay, *worth]


def _within_budget(menus: Sequence[Sequence[_Option]], taste: Taste) -> list[_Option]:
    """One option of each layer: slots are a budget, and go where a copy is worth most (CRAFT, arXiv 2603.28768).

    Begins with the fewest copies everywhere. Then, again and again, that layer is changed whose
    value rises most for each copy more.
    """
    if taste.budget is None:
        return [_fewest_copies(menu, taste.min_gain) for menu in menus]
    chosen = [min(menu, key=lambda option: (option.copies, -option.value)) for menu in menus]
    while True:
        left = taste.budget - sum(option.copies for option in chosen)
        best, index_of_best, rate = None, -1, 0.0
        for index, menu in enumerate(menus):
            for option in menu:
                more, rises = option.copies - chosen[index].copies, option.value - chosen[index].value
                if more <= left and rises > 0 and rises / max(more, 1) > rate:
                    best, index_of_best, rate = option, index, rises / max(more, 1)
        if best is None:
            return chosen
        chosen[index_of_best] = best


def _fewest_copies(menu: Sequence[_Option], min_gain: float) -> _Option:
    """Of the options that are nearly as good as the best, one with few copies."""
    best = max(option.value for option in menu)
    near = [option for option in menu if option.value >= best - min_gain * menu[0].cost]
    return min(near, key=lambda option: (option.copies, -option.value))

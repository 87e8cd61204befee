"""Measured load in, a better placement out, if it is worth the bytes.

For each layer some layouts are made: the present one improved by few steps, and new ones packed from
nothing, turned so that little moves. Each is worth the time that it saves, less the time that its
weights take to load. Survival comes first: every expert keeps its replicas on nodes of their own.

Legend: W windows, L layers, E experts, S usable shards.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster.policy.layout import Bools, Ints, NoLayout, Rooms, repaired
from cluster.policy.load import Loads
from cluster.policy.options import LayerLoad, Taste, choose, cost_of, load_by_layer
from experts.placement import Placement


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

    bandwidth_bytes_s: how fast a shard loads them beside its work; all shards load at once. horizon_s: for how long a
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
    """placement: what is proposed, or the present one. imbalance: see imbalance_of. gain: share of the
    shards' time saved. gain_tok_s: rows per second and layer that they could compute more. copies: over
    all layers. is_accepted: whether to change to it; reason: why, in numbers.
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
    load_L = load_by_layer(loads)
    total = sum(cost_of(held_ES, load) for held_ES, load in zip(start_LES, load_L, strict=True))
    taste = Taste(
        price=total * settings.load_s / len(usable) / settings.horizon_s,
        goal=1.0 + (settings.threshold - 1.0) / 2,
        min_gain=settings.min_gain,
        budget=None if settings.max_extra is None else settings.max_extra + mean_LE.size * rooms.least_copies,
    )
    chosen_LES = choose(load_L, now_LES, start_LES, rooms, taste)
    found = _compared(load_L, now_LES, start_LES, chosen_LES, current, settings)
    accepted, why = _verdict(
        found, is_broken, is_same=bool((chosen_LES == now_LES).all()), settings=settings, shards=len(usable)
    )
    found = replace(found, is_accepted=accepted, reason=f"{why}: {found.reason}")
    if not accepted:
        return found
    return replace(found, placement=_placement(current, loads.layers, chosen_LES, [shard.number for shard in usable]))


def imbalance_of(loads: Loads, placement: Placement, shards: Sequence[ShardRoom]) -> float:
    """Largest load of the shards, at mean + Z * deviation, over their mean; averaged over the layers that have any.

    >>> from experts.placement import even_placement
    >>> loads = Loads((0,), np.array([[[3.0, 1.0]]]))
    >>> imbalance_of(loads, even_placement([0], 2, 2), [ShardRoom(0, "", 2), ShardRoom(1, "", 2)])
    1.5
    """
    numbers = [shard.number for shard in shards if shard.is_usable]
    if not numbers or not loads.layers:
        return 1.0
    return _imbalance(_held(placement, loads.layers, numbers), load_by_layer(loads))


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


def _compared(
    load_L: Sequence[LayerLoad],
    now_LES: Bools,
    start_LES: Bools,
    chosen_LES: Bools,
    current: Placement,
    settings: BalanceSettings,
) -> Proposal:
    """What the chosen layouts are against the present ones. Not yet judged."""

    def cost(held_LES: Bools) -> float:
        return sum(cost_of(held_ES, load) for held_ES, load in zip(held_LES, load_L, strict=True))

    cost_before, cost_after = cost(start_LES), cost(chosen_LES)
    gain = 1.0 - cost_after / cost_before if cost_before > 0 else 0.0
    rate = float(np.mean([load.mean_E.sum() for load in load_L]))
    moved = int((chosen_LES & ~now_LES).sum())
    before, after = _imbalance(start_LES, load_L), _imbalance(chosen_LES, load_L)
    copies_before, copies_after = int(now_LES.sum()), int(chosen_LES.sum())
    facts = (
        f"imbalance {before:.2f} -> {after:.2f}, gain {gain:.1%} of {settings.horizon_s:.0f} s, {moved} experts or "
        f"{moved * settings.load_s / now_LES.shape[2]:.1f} s to load, copies {copies_before} -> {copies_after}"
    )
    return Proposal(
        placement=current,
        imbalance_before=before,
        imbalance_after=after,
        moved_bytes=moved * settings.expert_bytes,
        gain=gain,
        gain_tok_s=rate * (cost_before / cost_after - 1.0) if cost_after else 0.0,
        copies_before=copies_before,
        copies_after=copies_after,
        is_accepted=False,
        reason=facts,
    )


def _verdict(
    found: Proposal, is_broken: bool, *, is_same: bool, settings: BalanceSettings, shards: int
) -> tuple[bool, str]:
    """Whether to change, and why."""
    load_s = found.moved_bytes / settings.bandwidth_bytes_s / shards
    if is_broken:
        return True, "experts lack copies where they may be"
    if is_same:
        return False, "no change pays"
    if found.only_sheds:
        return True, "some copies bring little"
    if found.imbalance_before <= settings.threshold:
        return False, f"the imbalance is not above {settings.threshold:g}"
    if found.gain < settings.min_gain:
        return False, f"the gain is less than {settings.min_gain:.1%}"
    if found.gain * settings.horizon_s <= load_s:
        return False, "loading takes longer than it saves"
    return True, "it pays"


def _imbalance(held_LES: Bools, load_L: Sequence[LayerLoad]) -> float:
    """Of the layers that have any load, the mean."""
    of_layers = [
        cost_of(held_ES, load) * held_ES.shape[1] / float(load.mean_E.sum())
        for held_ES, load in zip(held_LES, load_L, strict=True)
        if load.mean_E.any()
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

"""One layer's layout: which shard holds which expert, and whether that is allowed.

Legend: E experts, S usable shards, M nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rooms:
    """What a layout must keep to. slots_S: experts of one layer that fit. node_S: numbered from 0.

    replicas: copies that every expert has, on as many nodes as there are, or on `replicas` of them.
    """

    slots_S: Ints
    node_S: Ints
    replicas: int

    @cached_property
    def on_node_SM(self) -> Ints:
        """1 where the shard is on the node."""
        on_node_SM: Ints = (self.node_S[:, None] == np.arange(self.node_S.max() + 1)).astype(np.int64)
        return on_node_SM

    @property
    def least_copies(self) -> int:
        return min(self.replicas, len(self.slots_S))

    @property
    def least_nodes(self) -> int:
        return min(self.replicas, int(self.node_S.max()) + 1)


def load_of_shards(held_ES: Bools, mean_E: Floats) -> Floats:
    """load_S, if the copies of an expert share its load evenly.

    >>> load_of_shards(np.array([[True, True], [False, True]]), np.array([6.0, 1.0])).tolist()
    [3.0, 4.0]
    """
    load_S: Floats = (mean_E / np.maximum(held_ES.sum(axis=1), 1)) @ held_ES
    return load_S


def covered_nodes(held_ES: Bools, rooms: Rooms) -> Ints:
    """On how many nodes each expert is."""
    nodes_E: Ints = (held_ES @ rooms.on_node_SM > 0).sum(axis=1)
    return nodes_E


def unmet(held_ES: Bools, rooms: Rooms) -> Sequence[int]:
    """The experts with too few copies, or on too few nodes."""
    copies_E, nodes_E = held_ES.sum(axis=1), covered_nodes(held_ES, rooms)
    short: Ints = np.flatnonzero((copies_E < rooms.least_copies) | (nodes_E < rooms.least_nodes))
    return [int(expert) for expert in short]


def may_leave(held_ES: Bools, rooms: Rooms) -> Bools:
    """Copies that are not needed for the least number of copies and nodes: each by itself may go."""
    has_spare_E: Bools = held_ES.sum(axis=1) > rooms.least_copies
    if rooms.least_nodes == 1:
        return held_ES & has_spare_E[:, None]
    on_EM = held_ES @ rooms.on_node_SM
    is_last_on_node_ES = on_EM[:, rooms.node_S] <= 1
    nodes_after_ES = (on_EM > 0).sum(axis=1)[:, None] - is_last_on_node_ES
    keeps_nodes_ES: Bools = nodes_after_ES >= rooms.least_nodes
    return held_ES & has_spare_E[:, None] & keeps_nodes_ES


def may_move(held_ES: Bools, rooms: Rooms, expert: Ints, source: Ints | int, target: Ints | int) -> Bools:
    """Whether a copy of `expert` may go from shard `source` to shard `target`, for arrays that fit together.

    It may not if the expert would then be on fewer nodes than now, and on too few.
    """
    on_EM, node_S = held_ES @ rooms.on_node_SM, rooms.node_S
    nodes = (on_EM > 0).sum(axis=1)[expert]
    leaves = on_EM[expert, node_S[source]] == 1
    comes = (on_EM[expert, node_S[target]] == 0) | (leaves & (node_S[source] == node_S[target]))
    may: Bools = nodes - leaves + comes >= np.minimum(nodes, rooms.least_nodes)
    return may


def repaired(held_ES: Bools, mean_E: Floats, rooms: Rooms) -> Bools:
    """The layout with the copies that are missing, each where least is to do; nothing else moves unless it must.

    Raises NoLayout. Example: expert 1 was on a shard that is gone, and goes where there is room:

    >>> rooms = Rooms(np.array([1, 1]), np.array([0, 0]), replicas=1)
    >>> repaired(np.array([[True, False], [False, False]]), np.array([2.0, 1.0]), rooms).tolist()
    [[True, False], [False, True]]
    """
    held_ES = held_ES.copy()
    for shard in np.flatnonzero(held_ES.sum(axis=0) > rooms.slots_S):
        _shrink(held_ES, int(shard), mean_E, rooms)
    for expert in sorted(unmet(held_ES, rooms), key=lambda expert: -mean_E[expert]):
        while held_ES[expert].sum() < rooms.least_copies:
            _add_copy(held_ES, expert, mean_E, rooms)
        while covered_nodes(held_ES[expert : expert + 1], rooms)[0] < rooms.least_nodes:
            _spread(held_ES, expert, mean_E, rooms)
    return held_ES


class NoLayout(Exception):
    """Not all experts fit. The message says which number does not."""


def _shrink(held_ES: Bools, shard: int, mean_E: Floats, rooms: Rooms) -> None:
    """Let a shard that holds too much go of what others hold, too, and then of what loads least."""
    while held_ES[:, shard].sum() > rooms.slots_S[shard]:
        spare_E = may_leave(held_ES, rooms)[:, shard]
        among = spare_E if spare_E.any() else held_ES[:, shard]
        expert = min(np.flatnonzero(among), key=lambda expert: mean_E[expert] / held_ES[expert].sum())
        held_ES[expert, shard] = False


def _new_places(held_ES: Bools, expert: int, rooms: Rooms) -> Bools:
    """Shards without the expert, of other nodes than it is on while there have to be more of these."""
    on_M: Bools = held_ES[expert] @ rooms.on_node_SM > 0
    places_S: Bools = ~held_ES[expert]
    if on_M.sum() < rooms.least_nodes:
        places_S &= ~on_M[rooms.node_S]
    return places_S


def _add_copy(held_ES: Bools, expert: int, mean_E: Floats, rooms: Rooms) -> None:
    load_S, places_S = load_of_shards(held_ES, mean_E), _new_places(held_ES, expert, rooms)
    free_S = held_ES.sum(axis=0) < rooms.slots_S
    for shard in sorted(np.flatnonzero(places_S), key=lambda shard: (not free_S[shard], load_S[shard])):
        if free_S[shard] or _make_room(held_ES, int(shard), rooms):
            held_ES[expert, shard] = True
            return
    raise NoLayout(
        f"{len(held_ES)} experts with {rooms.least_copies} copies each, on {rooms.least_nodes} nodes, do not fit into "
        f"{int(rooms.slots_S.sum())} slots on {len(rooms.slots_S)} shards"
    )


def _make_room(held_ES: Bools, shard: int, rooms: Rooms) -> bool:
    """Free a slot of the shard: drop a copy that may go, or move one to a shard with a free slot; whether it worked."""
    spare = np.flatnonzero(may_leave(held_ES, rooms)[:, shard])
    if len(spare):
        held_ES[spare[0], shard] = False
        return True
    others = np.flatnonzero(held_ES.sum(axis=0) < rooms.slots_S)
    for expert in np.flatnonzero(held_ES[:, shard]):
        for other in others:
            if other != shard and not held_ES[expert, other]:
                before = covered_nodes(held_ES[expert : expert + 1], rooms)[0]
                held_ES[expert, shard], held_ES[expert, other] = False, True
                after = covered_nodes(held_ES[expert : expert + 1], rooms)[0]
                if after >= min(before, rooms.least_nodes):
                    return True
                held_ES[expert, shard], held_ES[expert, other] = True, False
    return False


def _spread(held_ES: Bools, expert: int, mean_E: Floats, rooms: Rooms) -> None:
    """Move one copy from a node that has several of the expert's to a node that has none."""
    on_M = held_ES[expert] @ rooms.on_node_SM
    crowded = np.flatnonzero(held_ES[expert] & (on_M[rooms.node_S] > 1))
    _add_copy(held_ES, expert, mean_E, rooms)
    if held_ES[expert].sum() > rooms.least_copies and len(crowded):
        held_ES[expert, crowded[0]] = False

"""Which shard takes which part of a new layout, so that the fewest weights move.

Legend: E experts, S shards.
"""

import numpy as np

from cluster.policy.layout import Bools, Rooms

_NEVER = 1e9


def aligned(held_ES: Bools, now_ES: Bools, rooms: Rooms) -> Bools:
    """The same columns in another order: that in which few copies are new where they come.

    Where copies have to be on different nodes, a node takes all columns of another node of its size:
    first nodes are matched by what they lack, then the shards of each.

    >>> rooms = Rooms(np.array([1, 1]), np.array([0, 0]), replicas=1)
    >>> new, now = np.array([[True, False], [False, True]]), np.array([[False, True], [True, False]])
    >>> bool((aligned(new, now, rooms) == now).all())
    True
    """
    node_S = rooms.node_S if rooms.least_nodes > 1 else np.zeros_like(rooms.node_S)
    shards_of = [np.flatnonzero(node_S == node) for node in range(int(node_S.max()) + 1)]
    held_EM, now_EM = (np.stack([of[:, on].sum(axis=1) for on in shards_of], axis=1) for of in (held_ES, now_ES))
    size_M = np.array([len(on) for on in shards_of])
    placed_ES = np.zeros_like(held_ES)
    for source, target in _matched(held_EM > 0, now_EM > 0, size_M[:, None] == size_M):
        columns, places = shards_of[source], shards_of[target]
        fits_SS = held_ES[:, columns].sum(axis=0)[:, None] <= rooms.slots_S[places]
        for column, place in _matched(held_ES[:, columns], now_ES[:, places], fits_SS):
            placed_ES[:, places[place]] = held_ES[:, columns[column]]
    return placed_ES


def _matched(new_EX: Bools, now_EX: Bools, may_XX: Bools) -> list[tuple[int, int]]:
    """Pairs (new column, present column), each once, so that present columns lack little of the new."""
    from scipy.optimize import linear_sum_assignment  # 50 MB and half a second, which only the controller needs

    lacks_XX = new_EX.sum(axis=0)[:, None] - new_EX.T.astype(np.float64) @ now_EX.astype(np.float64)
    rows, chosen = linear_sum_assignment(np.where(may_XX, lacks_XX, _NEVER))
    return list(zip(rows.tolist(), chosen.tolist(), strict=True))

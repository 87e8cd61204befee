"""A placement as arrays: which shard computes the rows of a step.

Legend: L MoE layers, E experts, S shards.
"""

from collections.abc import Set
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from experts.placement import Placement
from router.model.replica_choice import ROWS_PER_EXPERT, choose_replicas

Counts = npt.NDArray[np.int64]


class ShardWork(NamedTuple):
    """What every shard is asked for in every layer: distinct experts, and rows."""

    experts_LS: Counts
    rows_LS: Counts


class RouteTable:
    """Who computes what, while the placement and the living shards stay as they are.

    An expert with one living holder is settled. For the others `choose_replicas` decides by the
    rows of the step, as in a router. It takes experts with few holders first, so the settled ones
    come first, and only their sum matters: each shard's are given to it as one expert that costs
    as much as they do.
    """

    def __init__(self, placement: Placement, living: Set[int], num_shards: int) -> None:
        self.placement, self._num_shards = placement, num_shards
        holders_of = [
            [[shard for shard in shards if shard in living] for shards in by_expert]
            for by_expert in placement.shards_of.values()
        ]
        self._shape = (len(holders_of), num_shards)
        self._only_LE = np.array(
            [[holders[0] if len(holders) == 1 else -1 for holders in by_expert] for by_expert in holders_of], np.int64
        )
        self._away_LE = np.array([[not holders for holders in by_expert] for by_expert in holders_of], bool)
        self._shared_of = [
            {expert: holders for expert, holders in enumerate(by_expert) if len(holders) > 1}
            for by_expert in holders_of
        ]

    def is_away(self, rows_LE: Counts) -> bool:
        """Whether an expert that the step needs has no living holder."""
        return bool((rows_LE[self._away_LE.reshape(rows_LE.shape)] > 0).any())

    def share_out(self, rows_LE: Counts) -> ShardWork:
        """Which shards compute the rows. Every expert that has any must have a living holder."""
        layers, shards = self._shape
        if not layers:
            return ShardWork(np.zeros(self._shape, np.int64), np.zeros(self._shape, np.int64))
        layer_N, expert_N = ((rows_LE > 0) & (self._only_LE >= 0)).nonzero()
        at_N = layer_N * shards + self._only_LE[layer_N, expert_N]
        experts_LS = np.bincount(at_N, minlength=layers * shards).reshape(self._shape)
        rows_LS = np.bincount(at_N, rows_LE[layer_N, expert_N], layers * shards).astype(np.int64).reshape(self._shape)
        for layer, shared in enumerate(self._shared_of):
            rows = {expert: int(rows_LE[layer, expert]) for expert in shared if rows_LE[layer, expert]}
            if rows:
                self._share_layer(rows, [shared[expert] for expert in rows], experts_LS[layer], rows_LS[layer])
        return ShardWork(experts_LS, rows_LS)

    def _share_layer(self, rows: dict[int, int], holders: list[list[int]], experts_S: Counts, rows_S: Counts) -> None:
        """Add a layer's experts that have several holders to the work of those that are chosen."""
        busy = sorted({shard for shards in holders for shard in shards if experts_S[shard]})
        settled = [round(ROWS_PER_EXPERT * (int(experts_S[shard]) - 1)) + int(rows_S[shard]) for shard in busy]
        # Those with several holders come first: among equals, the order of their numbers decides.
        count_of = dict(enumerate([*rows.values(), *settled]))
        chosen = choose_replicas(count_of, [*holders, *([shard] for shard in busy)], {})
        for index, count in enumerate(rows.values()):
            experts_S[chosen[index]] += 1
            rows_S[chosen[index]] += count

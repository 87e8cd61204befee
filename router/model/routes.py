"""Which living shard computes each expert, and the order in which rows are sorted for the shards.

Legend: E experts. A rank is an expert's position in that order.
"""

from collections.abc import Sequence, Set
from typing import NamedTuple

import torch

from experts.placement import Placement


class Routes:
    """One LayerRoutes for each MoE layer.

    Never changed: a new placement or set of living shards makes a new one.

    alive: the shards that can be reached. An expert's rows go to the first living shard of its
    list in the placement. If none lives, they go to the first of the list, so that the error names
    it.
    """

    def __init__(self, placement: Placement, alive: Set[int]) -> None:
        self.alive = alive
        self.layers = {
            layer: LayerRoutes([_asked(shards, alive) for shards in by_expert], placement.versions_of[layer])
            for layer, by_expert in placement.shards_of.items()
        }


class ShardRoutes(NamedTuple):
    """The experts that one shard computes in one layer.

    ranks: of `experts`. versions: of their weights.
    """

    shard: int
    ranks: slice
    experts: list[int]
    versions: list[int]


class LayerRoutes:
    """The experts of one layer, ranked by (shard, expert): rows in that order are contiguous for shard and expert.

    num_ranks: the number of experts. rank_E: each expert's rank. rank_of_expert: the same memory
    as a numpy array.
    shards: in ascending order of their ranks.
    """

    def __init__(self, shard_of_expert: Sequence[int], version_of_expert: Sequence[int]) -> None:
        self.num_ranks = len(shard_of_expert)
        self.rank_E = torch.empty(self.num_ranks, dtype=torch.int64)
        self.shards: list[ShardRoutes] = []
        first = 0
        for shard in sorted(set(shard_of_expert)):
            experts = [expert for expert, asked in enumerate(shard_of_expert) if asked == shard]
            ranks = slice(first, first + len(experts))
            self.rank_E[torch.tensor(experts)] = torch.arange(ranks.start, ranks.stop)
            self.shards.append(ShardRoutes(shard, ranks, experts, [version_of_expert[expert] for expert in experts]))
            first = ranks.stop
        self.rank_of_expert = self.rank_E.numpy()


def _asked(shards: Sequence[int], alive: Set[int]) -> int:
    return next((shard for shard in shards if shard in alive), shards[0])

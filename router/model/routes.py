"""Which shard is asked for each expert: a placement, as far as its shards are alive, in the order of the rows.

Legend: E experts, R the same in the order of rows.
"""

from collections.abc import Sequence, Set

import torch

from experts.placement import Placement


class Routes:
    """One LayerRoutes for each MoE layer. Never changed: a new placement or set of living shards makes a new one.

    alive: the shards that can be reached. The first living shard that a placement names for an expert is asked; if
    none lives, the first one named, so that the error tells who is missing.
    """

    def __init__(self, placement: Placement, alive: Set[int]) -> None:
        self.alive = alive
        self.layers = {
            layer: LayerRoutes([_asked(shards, alive) for shards in by_expert], placement.versions_of[layer])
            for layer, by_expert in placement.shards_of.items()
        }


class LayerRoutes:
    """The experts of one layer, ranked by (shard, expert): rows in that order are contiguous for shard and expert.

    rank_E: each expert's rank, for torch; rank_of_expert: the same for numpy. expert_of_rank: its inverse.
    version_of_rank: of the expert's weights. ranks_of_shard: each shard's ranks, ascending.
    """

    def __init__(self, shard_of_expert: Sequence[int], version_of_expert: Sequence[int]) -> None:
        experts = range(len(shard_of_expert))
        self.expert_of_rank = sorted(experts, key=lambda expert: (shard_of_expert[expert], expert))
        self.version_of_rank = [version_of_expert[expert] for expert in self.expert_of_rank]
        self.rank_E = torch.empty(len(experts), dtype=torch.int64)
        self.rank_E[torch.tensor(self.expert_of_rank)] = torch.arange(len(experts))
        self.rank_of_expert = self.rank_E.numpy()
        self.ranks_of_shard: dict[int, list[int]] = {}
        for rank, expert in enumerate(self.expert_of_rank):
            self.ranks_of_shard.setdefault(shard_of_expert[expert], []).append(rank)


def _asked(shards: Sequence[int], alive: Set[int]) -> int:
    return next((shard for shard in shards if shard in alive), shards[0])

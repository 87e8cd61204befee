"""Which living shard computes each expert, and the order in which rows are sorted for the shards.

Legend: E experts. A rank is an expert's position in that order.
"""

from collections.abc import Sequence, Set
from typing import NamedTuple

import numpy as np
import torch

from experts.placement import Placement
from kernels.upload import upload


class Routes:
    """One LayerRoutes for each MoE layer.

    Never changed: a new placement or set of living shards makes a new one.

    alive: the shards that can be reached. An expert's rows go to the first living shard of its
    list in the placement. If none lives, they go to the first of the list, so that the error names
    it.
    """

    def __init__(self, placement: Placement, alive: Set[int], device: torch.device) -> None:
        """device: the one that gates compute on."""
        self.alive = alive
        ranked = [
            _ranked([_asked(shards, alive) for shards in by_expert], placement.versions_of[layer])
            for layer, by_expert in placement.shards_of.items()
        ]
        ranks = upload([rank_of_expert for rank_of_expert, _ in ranked], device)
        self.layers = {
            layer: LayerRoutes(len(rank_of_expert), rank_E, rank_of_expert, shards)
            for layer, rank_E, (rank_of_expert, shards) in zip(placement.shards_of, ranks, ranked, strict=True)
        }


class ShardRoutes(NamedTuple):
    """The experts that one shard computes in one layer.

    ranks: of `experts`. versions: of their weights.
    """

    shard: int
    ranks: slice
    experts: list[int]
    versions: list[int]


class LayerRoutes(NamedTuple):
    """The experts of one layer, ranked by (shard, expert): rows in that order are contiguous for shard and expert.

    num_ranks: the number of experts. rank_E: each expert's rank, on the device. rank_of_expert:
    the same on the host.
    shards: in ascending order of their ranks.
    """

    num_ranks: int
    rank_E: torch.Tensor
    rank_of_expert: np.ndarray
    shards: list[ShardRoutes]


def _ranked(shard_of_expert: Sequence[int], version_of_expert: Sequence[int]) -> tuple[np.ndarray, list[ShardRoutes]]:
    """(rank_of_expert, shards) of a LayerRoutes."""
    rank_of_expert = np.empty(len(shard_of_expert), np.int64)
    found: list[ShardRoutes] = []
    first = 0
    for shard in sorted(set(shard_of_expert)):
        experts = [expert for expert, asked in enumerate(shard_of_expert) if asked == shard]
        ranks = slice(first, first + len(experts))
        rank_of_expert[experts] = np.arange(ranks.start, ranks.stop)
        found.append(ShardRoutes(shard, ranks, experts, [version_of_expert[expert] for expert in experts]))
        first = ranks.stop
    return rank_of_expert, found


def _asked(shards: Sequence[int], alive: Set[int]) -> int:
    return next((shard for shard in shards if shard in alive), shards[0])

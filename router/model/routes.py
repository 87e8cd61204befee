"""Which shard computes each expert, and the order in which rows are sorted for the shards.

Legend: E experts. A rank is an expert's position in that order.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from experts.link_table import Use
from experts.placement import Placement
from kernels.upload import upload
from router.model.replica_choice import choose_replicas

Counts = npt.NDArray[np.int64]


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

    Experts without rows may have no rank. rank_E: each expert's rank, on the device.
    expert_of_rank: on the host.
    shards: in ascending order of their ranks.
    """

    rank_E: torch.Tensor
    expert_of_rank: Counts
    shards: list[ShardRoutes]


class Routes:
    """Where the rows of each layer go, while the placement and the shards' uses stay as they are.

    Never changed: a new placement or a new use_of makes a new one.

    An expert's rows go to one of the living shards that hold it and are of the best use among
    them. If several are, the step's rows decide (`choose_replicas`). If none lives, they go to the
    first shard of its list in the placement, where they will be missed.
    """

    def __init__(self, placement: Placement, use_of: Mapping[int, Use], device: torch.device) -> None:
        """use_of: the living shards. device: the one that gates compute on."""
        self.placement, self.use_of = placement, use_of
        self._device, self._versions_of = device, placement.versions_of
        self._holders_of = {
            layer: [best_holders(shards, use_of) or shards[:1] for shards in by_expert]
            for layer, by_expert in placement.shards_of.items()
        }
        settled = {
            layer: {expert: holders[0] for expert, holders in enumerate(by_expert)}
            for layer, by_expert in self._holders_of.items()
            if all(len(holders) == 1 for holders in by_expert)
        }
        ranked = [_ranked(shard_of, placement.versions_of[layer]) for layer, shard_of in settled.items()]
        ranks = upload([_ranks(expert_of_rank, len(expert_of_rank)) for expert_of_rank, _ in ranked], device)
        self._settled = {
            layer: LayerRoutes(rank_E, *of_layer)
            for layer, rank_E, of_layer in zip(settled, ranks, ranked, strict=True)
        }

    def layer(self, layer: int, count_E: Counts, slowness: Callable[[], Mapping[int, float]]) -> LayerRoutes:
        """The routes of a layer for a step that has count_E[e] rows for expert e. slowness: see choose_replicas."""
        settled = self._settled.get(layer)
        if settled is not None:
            return settled
        active_E = count_E.nonzero()[0]
        active = dict(zip(active_E.tolist(), count_E[active_E].tolist(), strict=True))
        chosen = choose_replicas(active, self._holders_of[layer], slowness())
        expert_of_rank, shards = _ranked(chosen, self._versions_of[layer])
        rank_E = upload([_ranks(expert_of_rank, len(count_E))], self._device)[0]
        return LayerRoutes(rank_E, expert_of_rank, shards)


def best_holders(shards: Sequence[int], use_of: Mapping[int, Use]) -> Sequence[int]:
    """Of the shards that hold an expert, the living ones of the best use; none if none lives.

    Example: of (3, 1, 2), with 1 LOADING and 2 and 3 READY, it is (3, 2).
    """
    best = min((use_of[shard] for shard in shards if shard in use_of), default=None)
    return [shard for shard in shards if use_of.get(shard) == best and best is not None]


def _ranked(shard_of: Mapping[int, int], version_of_expert: Sequence[int]) -> tuple[Counts, list[ShardRoutes]]:
    """(expert_of_rank, shards) of a LayerRoutes for these experts, each with its shard."""
    ordered = sorted((shard, expert) for expert, shard in shard_of.items())
    found, first = [], 0
    for shard, group in groupby(ordered, key=itemgetter(0)):
        experts = [expert for _, expert in group]
        versions = [version_of_expert[expert] for expert in experts]
        found.append(ShardRoutes(shard, slice(first, first + len(experts)), experts, versions))
        first += len(experts)
    return np.array([expert for _, expert in ordered], np.int64), found


def _ranks(expert_of_rank: Counts, num_experts: int) -> Counts:
    """rank_E; 0 for experts that have none."""
    rank_E = np.zeros(num_experts, np.int64)
    rank_E[expert_of_rank] = np.arange(len(expert_of_rank))
    return rank_E

"""Sends each token to the shards that hold its experts, and puts the answers back in order.

`dispatch` returns a handle; only `combine` consumes it. Between the two the router is free to compute.

Legend: T tokens, D model width, E experts, R the same in the order of rows, A experts chosen per token, N = T * A rows
on their way to experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from experts.errors import LinkDown, ShardRefused
from experts.link import ExpertRows, Link, Reply
from experts.placement import Placement
from router.counts.expert_load import ExpertLoad


class ShardUnavailable(Exception):
    """A shard that this step needs cannot answer. The message names it and says why."""


@dataclass(frozen=True)
class DispatchHandle:
    """Rows under way: (shard, reply) in the order of the sorted rows, and how to undo the sorting.

    unsort_N: the sorted row of (token, choice) number n.
    """

    replies: Sequence[tuple[int, Reply]]
    unsort_N: torch.Tensor
    experts_per_token: int


class Dispatcher:
    """One router's view of all shards: the placement and a link to each."""

    def __init__(self, placement: Placement, links: Sequence[Link]) -> None:
        assert len(links) == placement.num_shards
        self.links = list(links)
        """By shard number. A dead link is replaced here, from any thread, by a new one."""
        self.load = ExpertLoad(placement)
        self._placement = placement
        # Rows are sorted by (shard, expert), so that a shard's rows, and within them an expert's, are contiguous.
        self._layers = {layer: _LayerOrder(by_expert) for layer, by_expert in placement.shards_of.items()}

    def down_reasons(self) -> dict[int, str]:
        """Shards that cannot be reached now, and why."""
        return {shard: reason for shard, link in enumerate(self.links) if (reason := link.down_reason) is not None}

    def dispatch(
        self, layer: int, x_TD: torch.Tensor, expert_TA: torch.Tensor, score_TA: torch.Tensor
    ) -> DispatchHandle:
        """Send every token, scaled by its score, to each of its experts. Raises ShardUnavailable.

        Llama 4 applies the score to the expert's input: shared(x) + sum over chosen experts of expert(score * x).
        """
        order = self._layers[layer]
        rank_N = order.rank_E.to(expert_TA.device)[expert_TA.flatten()]
        sort_N = torch.argsort(rank_N, stable=True)
        x_ND = x_TD[sort_N // expert_TA.shape[1]] * score_TA.flatten()[sort_N, None]
        counts_R = np.bincount(rank_N.cpu().numpy(), minlength=len(order.expert_of_rank))
        self.load.count((layer, counts_R, order.place_E))
        counts: list[int] = counts_R.tolist()
        replies, begin = [], 0
        for shard, ranks in order.ranks_of_shard.items():
            hit = [rank for rank in ranks if counts[rank]]
            if not hit:
                continue
            rows = sum(counts[rank] for rank in hit)
            message = ExpertRows(
                self._placement.version,
                layer,
                [order.expert_of_rank[rank] for rank in hit],
                [counts[rank] for rank in hit],
                x_ND[begin : begin + rows],
            )
            begin += rows
            try:
                replies.append((shard, self.links[shard].request(message)))
                self.load.rows_of_shard[shard] += rows
            except (LinkDown, ShardRefused) as error:
                raise ShardUnavailable(f"expert shard {shard}: {error}") from error
        unsort_N = torch.empty_like(sort_N)
        unsort_N[sort_N] = torch.arange(len(sort_N), device=sort_N.device)
        return DispatchHandle(replies, unsort_N, expert_TA.shape[1])

    def combine(self, handle: DispatchHandle) -> torch.Tensor:
        """y_TD: the sum of each token's experts. Waits for the shards; raises ShardUnavailable."""
        parts = []
        for shard, reply in handle.replies:
            try:
                parts.append(reply.wait())
            except (LinkDown, ShardRefused) as error:
                raise ShardUnavailable(f"expert shard {shard}: {error}") from error
        y_ND = torch.cat(parts)[handle.unsort_N]
        return y_ND.view(-1, handle.experts_per_token, y_ND.shape[-1]).sum(dim=1)


class _LayerOrder:
    """The order in which one layer's experts stand when rows are sorted by (shard, expert).

    rank_E: an expert's place in that order; expert_of_rank: its inverse; ranks_of_shard: each shard's places.
    """

    def __init__(self, shards_of_expert: Sequence[Sequence[int]]) -> None:
        # The first shard named for an expert is asked; replicas come with placement that changes.
        self.expert_of_rank = sorted(
            range(len(shards_of_expert)), key=lambda expert: (shards_of_expert[expert][0], expert)
        )
        self.rank_E = torch.empty(len(self.expert_of_rank), dtype=torch.int64)
        self.rank_E[torch.tensor(self.expert_of_rank)] = torch.arange(len(self.expert_of_rank))
        self.place_E = self.rank_E.numpy()
        self.ranks_of_shard: dict[int, list[int]] = {}
        for rank, expert in enumerate(self.expert_of_rank):
            self.ranks_of_shard.setdefault(shards_of_expert[expert][0], []).append(rank)

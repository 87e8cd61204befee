"""Sends each token to the shards that hold its experts, and puts the answers back in order.

`dispatch` returns a handle; only `combine` consumes it. Between the two the router is free to
compute.

Legend: T tokens, D model width, E experts, R the same in the order of rows, A experts chosen per
token, N = T * A rows on their way to experts.
"""

from collections.abc import Sequence
from itertools import compress
from typing import NamedTuple

import numpy as np
import torch

from experts.errors import LinkDown, ShardRefused
from experts.link import ExpertRows, Reply
from experts.link_table import LinkTable
from experts.placement import Placement
from router.counts.expert_load import ExpertLoad
from router.model.routes import Routes

CPU = torch.device("cpu")


class ShardUnavailable(Exception):
    """A shard that this step needs cannot answer. The message names it and says why."""


class Part(NamedTuple):
    """Rows that one shard was asked for.

    The message is all it takes to ask it again, or another shard.

    rows: which of the sorted rows these are.
    """

    shard: int
    rows: slice
    message: ExpertRows
    reply: Reply


class DispatchHandle(NamedTuple):
    """Rows under way, and how to undo the sorting.

    parts: in the order of the sorted rows, all of which they cover. unsort_N: the sorted row of
    (token, choice) n.
    """

    parts: Sequence[Part]
    unsort_N: torch.Tensor
    experts_per_token: int


class Dispatcher:
    """One router's view of all shards: the placement, and the links to those that are alive."""

    def __init__(self, placement: Placement, links: LinkTable, device: torch.device = CPU) -> None:
        """device: the one that gates compute on."""
        self.load = ExpertLoad(placement)
        self._placement = placement
        self._links = links
        self._device = device
        self._routes: Routes | None = None

    def down_reasons(self) -> dict[int, str]:
        """Shards that cannot be reached now, and why."""
        reasons = {shard: self._links.down_reason(shard) for shard in range(self._placement.num_shards)}
        return {shard: reason for shard, reason in reasons.items() if reason is not None}

    def dispatch(
        self, layer: int, x_TD: torch.Tensor, expert_TA: torch.Tensor, score_TA: torch.Tensor
    ) -> DispatchHandle:
        """Send every token, scaled by its score, to each of its experts. Raises ShardUnavailable.

        Llama 4 applies the score to the expert's input: shared(x) + sum over chosen experts of
        expert(score * x).
        """
        if self._routes is None or self._routes.alive is not self._links.alive:
            self._routes = Routes(self._placement, self._links.alive, self._device)
        routes = self._routes.layers[layer]
        rank_N = routes.rank_E[expert_TA.flatten()]
        sort_N = torch.argsort(rank_N, stable=True)
        x_ND = x_TD[sort_N // expert_TA.shape[1]] * score_TA.flatten()[sort_N, None]
        counts_R = np.bincount(rank_N.cpu().numpy(), minlength=routes.num_ranks)
        self.load.count((layer, counts_R, routes.rank_of_expert))
        counts: list[int] = counts_R.tolist()
        parts, begin = [], 0
        for shard, ranks, experts, versions in routes.shards:
            asked = counts[ranks]
            rows = slice(begin, begin + sum(asked))
            if rows.start == rows.stop:
                continue
            begin = rows.stop
            message = ExpertRows(
                layer,
                list(compress(experts, asked)),
                list(compress(versions, asked)),
                list(compress(asked, asked)),
                x_ND[rows],
            )
            parts.append(Part(shard, rows, message, self._request(shard, message)))
        unsort_N = torch.empty_like(sort_N)
        unsort_N[sort_N] = torch.arange(len(sort_N), device=sort_N.device)
        return DispatchHandle(parts, unsort_N, expert_TA.shape[1])

    def combine(self, handle: DispatchHandle) -> torch.Tensor:
        """y_TD: the sum of each token's experts.

        Waits for the shards, part by part; raises ShardUnavailable.
        """
        y_ND = torch.cat([self._wait(part) for part in handle.parts])[handle.unsort_N]
        return y_ND.view(-1, handle.experts_per_token, y_ND.shape[-1]).sum(dim=1)

    def _request(self, shard: int, message: ExpertRows) -> Reply:
        try:
            reply = self._links.link(shard).request(message)
        except (LinkDown, ShardRefused) as error:
            raise ShardUnavailable(f"expert shard {shard}: {error}") from error
        self.load.rows_of_shard[shard] += len(message.x_ND)
        return reply

    def _wait(self, part: Part) -> torch.Tensor:
        """y_ND of the part's rows."""
        try:
            return part.reply.wait()
        except (LinkDown, ShardRefused) as error:
            raise ShardUnavailable(f"expert shard {part.shard}: {error}") from error

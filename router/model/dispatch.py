"""Sends each token to the shards that hold its experts, and puts the answers back in order.

`dispatch` returns a handle; only `combine` consumes it. Between the two the router is free to
compute.

Legend: T tokens, D model width, E experts, R the same in the order of rows, A experts chosen per
token, N = T * A rows on their way to experts.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import NamedTuple

import numpy as np
import torch

from experts.link import ExpertRows
from experts.link_table import LinkTable
from experts.placement import Placement
from router.counts.expert_load import ExpertLoad
from router.model.asking import Asker, Part, RowsFailed
from router.model.routes import Routes

CPU = torch.device("cpu")


class TokensFailed(Exception):
    """The experts of these tokens gave no answer; other tokens are not concerned.

    tokens: indices into the step's tokens. is_away: see RowsFailed.
    """

    def __init__(self, tokens: Sequence[int], reason: str, *, is_away: bool) -> None:
        super().__init__(reason)
        self.tokens, self.is_away = tokens, is_away


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

    def __init__(
        self,
        placement: Placement,
        links: LinkTable,
        device: torch.device = CPU,
        heal_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """device: the one that gates compute on. heal_s: see Asker."""
        self.load = ExpertLoad(placement)
        self.asker = Asker(placement, links, heal_s, clock)
        self._links = links
        self._device = device
        self._swapping = threading.Lock()  # of routes; a step takes it only as it begins and ends
        self._is_amid_step = False
        self._newest = self._routes = Routes(placement, links.use_of, device)

    @property
    def placement(self) -> Placement:
        """By which steps that begin now are routed."""
        return self._newest.placement

    @property
    def in_use(self) -> tuple[Placement, ...]:
        """The newest one, and that of the step under way."""
        with self._swapping:
            return self._newest.placement, self._routes.placement

    @property
    def epoch(self) -> int:
        """Of the oldest placement in use: that of the step under way, or else the newest."""
        return self._routes.placement.epoch

    def route(self, placement: Placement) -> None:
        """Route by this placement from the next step on; one that is older than the newest is ignored. From any thread.

        Versions must be as before: rows under way may be asked for where the new placement says.
        """
        routes = Routes(placement, self._links.use_of, self._device)  # here, because it takes as long as a step
        with self._swapping:
            if placement.epoch < self._newest.placement.epoch:
                return
            self._newest = routes
            self.asker.placement = placement
            if not self._is_amid_step:
                self._routes = routes
        self._links.bell.ring()  # a step may wait for a shard that is not the only one any more

    @contextmanager
    def step(self) -> Iterator[None]:
        """All that is dispatched within is routed by one placement."""
        with self._swapping:
            self._routes, self._is_amid_step = self._newest, True
        try:
            yield
        finally:
            with self._swapping:
                self._routes, self._is_amid_step = self._newest, False

    @property
    def needed_shards(self) -> frozenset[int]:
        """The shards that hold anything as the placement says."""
        return self.placement.used_shards

    def down_reasons(self) -> dict[int, str]:
        """Needed shards that cannot be reached now, and why."""
        reasons = {shard: self._links.down_reason(shard) for shard in sorted(self.needed_shards)}
        return {shard: reason for shard, reason in reasons.items() if reason is not None}

    def missing_experts(self) -> int:
        """How many (layer, expert) no living shard holds now."""
        use_of: Mapping[int, object] = self._links.use_of
        by_experts = self.placement.shards_of.values()
        return sum(not any(shard in use_of for shard in shards) for by_expert in by_experts for shards in by_expert)

    def wake(self) -> None:
        """Have a `combine` that waits call asker.while_waiting soon. From any thread."""
        self._links.bell.ring()

    def dispatch(
        self, layer: int, x_TD: torch.Tensor, expert_TA: torch.Tensor, score_TA: torch.Tensor
    ) -> DispatchHandle:
        """Send every token, scaled by its score, to each of its experts.

        Llama 4 applies the score to the expert's input: shared(x) + sum over chosen experts of
        expert(score * x).
        """
        step_routes = self._routes_now()
        expert_N = expert_TA.flatten()
        count_E = np.bincount(expert_N.cpu().numpy(), minlength=len(step_routes.placement.shards_of[layer]))
        self.load.count((layer, count_E))
        routes = step_routes.layer(layer, count_E, self.asker.slowness_now)
        sort_N = torch.argsort(routes.rank_E[expert_N], stable=True)
        x_ND = x_TD[sort_N // expert_TA.shape[1]] * score_TA.flatten()[sort_N, None]
        row_N = torch.arange(len(sort_N))
        counts: list[int] = count_E[routes.expert_of_rank].tolist()
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
            parts.append(self.asker.ask(shard, row_N[rows], message))
        unsort_N = torch.empty_like(sort_N)
        unsort_N[sort_N] = torch.arange(len(sort_N), device=sort_N.device)
        return DispatchHandle(parts, unsort_N, expert_TA.shape[1])

    def _routes_now(self) -> Routes:
        """Those of the step, for the shards that can be asked now."""
        if self._routes.use_of is not self._links.use_of:
            self.asker.speeds.keep_only(self._links.use_of)
            old = self._routes
            new = Routes(old.placement, self._links.use_of, self._device)
            with self._swapping:
                self._routes = new
                if self._newest is old:
                    self._newest = new
        return self._routes

    def combine(self, handle: DispatchHandle) -> torch.Tensor:
        """y_TD: the sum of each token's experts.

        Waits for the shards, and asks others where one fails. No row is taken from anybody but the
        shards that this step has asked, at the versions that it asked for: whatever comes of y_TD
        is what the placement says. Raises TokensFailed, and what asker.while_waiting raises.
        """
        try:
            self.asker.wait(handle.parts)
        except RowsFailed as error:
            failed_N = torch.isin(handle.unsort_N.cpu(), error.rows_N)
            tokens = (failed_N.nonzero().flatten() // handle.experts_per_token).unique().tolist()
            raise TokensFailed(tokens, str(error), is_away=error.is_away) from error
        answers = [part.answer_ND for part in handle.parts if part.answer_ND is not None]
        y_ND = torch.cat(answers)[handle.unsort_N]
        return y_ND.view(-1, handle.experts_per_token, y_ND.shape[-1]).sum(dim=1)

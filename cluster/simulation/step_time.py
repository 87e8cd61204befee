"""How long a step takes: the formulas.

Legend: T tokens, L MoE layers, S shards, N nodes.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.simulation.route_table import ShardWork
from cluster.simulation.scenario import Scenario

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class StepTimes:
    """A step in seconds.

    before_s: before its first layer, and after its last. router_L: the router's own time in each
    layer. link_LS: a message's way to a shard, and the same back. work_LS: computing on the shard;
    0 where it is not asked.
    """

    before_s: float
    router_L: Floats
    link_LS: Floats
    work_LS: Floats


class StepTimer:
    """The scenario's costs as arrays, and the shards' queues.

    A shard computes messages in the order of arrival. A node whose shards together need more than
    its processors is done when their sum over `parallel` is: `free_N`.
    """

    def __init__(self, scenario: Scenario, num_shards: int) -> None:
        self._costs, self._model = scenario.costs, scenario.model
        self._per_node = scenario.shards.per_node
        self._node_S = np.arange(num_shards) // self._per_node
        self._parallel = scenario.shards.parallel
        self.free_S: Floats = np.zeros(num_shards)
        self._free_N: Floats = np.zeros(int(self._node_S[-1]) + 1 if num_shards else 0)

    def times(self, tokens: int, context: int, work: ShardWork, slowdown_S: Floats) -> StepTimes:
        """tokens: of the step. context: tokens that these attend to, summed. slowdown_S: see load_slowdown."""
        router, shard, link = self._costs.router, self._costs.shard, self._costs.link
        asked_LS = (work.experts_LS > 0).astype(np.float64)
        read_s = work.experts_LS * (self._model.expert_bytes / (shard.read_gb_s * 1e9))
        work_LS = (asked_LS * (shard.message_us * 1e-6) + read_s + work.rows_LS * (shard.row_us * 1e-6)) * slowdown_S
        own_us = router.layer_us + router.layer_token_us * tokens + router.context_us * context
        bytes_LS = work.rows_LS.astype(np.float64) * self._model.row_bytes
        return StepTimes(
            (router.step_us + router.token_us * tokens) * 1e-6,
            (own_us + router.message_us * asked_LS.sum(axis=1)) * 1e-6,
            link.latency_us * 0.5e-6 + bytes_LS / (link.gb_s * 1e9),
            work_LS,
        )

    def alone_s(self, times: StepTimes) -> float:
        """The whole step of the only router, whose shards are idle whenever it asks."""
        if not len(times.router_L) or not times.work_LS.shape[1]:
            return times.before_s + float(times.router_L.sum())
        done_LS = times.work_LS
        if self._parallel is not None:
            done_LS = np.maximum(done_LS, self._on_nodes(times.work_LS)[:, self._node_S] / self._parallel)
        done_L = np.max(np.where(times.work_LS > 0, done_LS + 2.0 * times.link_LS, 0.0), axis=1)
        return times.before_s + float((times.router_L + done_L).sum())

    def layer_done_s(self, times: StepTimes, layer: int, now_s: float) -> float:
        """When a layer that is sent now has all its answers. The shards' queues grow by it."""
        work_S, link_S = times.work_LS[layer], times.link_LS[layer]
        asked_S = work_S > 0
        arrives_S = now_s + link_S
        done_S = np.maximum(self.free_S, arrives_S) + work_S
        if self._parallel is not None:
            work_N = self._on_nodes(work_S[None])[0]
            begin_N = np.maximum(self._free_N, now_s)
            self._free_N = np.where(work_N > 0, begin_N + work_N / self._parallel, self._free_N)
            done_S = np.maximum(done_S, self._free_N[self._node_S])
        self.free_S = np.where(asked_S, done_S, self.free_S)
        return max(now_s, float(np.max(np.where(asked_S, done_S + link_S, 0.0), initial=0.0)))

    def _on_nodes(self, work_LS: Floats) -> Floats:
        """work_LN: summed over the shards of each node."""
        first_N = np.arange(0, len(self._node_S), self._per_node)
        work_LN: Floats = np.add.reduceat(work_LS, first_N, axis=1)
        return work_LN

"""The feed-forward half of a layer: a dense MLP, or routed experts beside a shared one.

Legend: T tokens, D model width, F MLP width, E experts, A experts chosen per token.
"""

from time import perf_counter

import torch

from checkpoint.config import ModelConfig
from checkpoint.layout import TensorNames
from checkpoint.weights import WeightReader
from kernels.kernels import Kernels
from router.counts.step_clock import StepClock
from router.model.dispatch import Dispatcher


class DenseMlp:
    """SwiGLU, down(silu(gate(x)) * up(x)): an expert that every token goes to."""

    def __init__(self, prefix: str, weights: WeightReader, kernels: Kernels) -> None:
        """prefix: the tensor name up to `.gate_proj.weight`."""
        gate_up = [weights.read(f"{prefix}.{which}_proj.weight") for which in ("gate", "up")]
        self._expert = kernels.expert(torch.cat(gate_up), weights.read(f"{prefix}.down_proj.weight"))
        self._kernels = kernels

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self._kernels.grouped_mlp(x_TD, [self._expert], [len(x_TD)])


def choose_experts(logit_TE: torch.Tensor, experts_per_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(expert_TA, score_TA): the top experts by logit, and their logits' sigmoids.

    The sigmoids are not renormalised.
    The sigmoid is taken in fp32 and returned in the logits' dtype, as transformers' Llama4Router
    does.
    """
    top_TA, expert_TA = torch.topk(logit_TE, experts_per_token, dim=-1)
    # On a CPU, torch.sigmoid rounds the last tokens of a batch, which fill no vector, otherwise
    # than the others. torch.exp does not.
    return expert_TA, torch.exp(-top_TA.float()).add_(1.0).reciprocal_().type_as(logit_TE)


class MoeMlp:
    """shared(x) + sum over the chosen experts of expert(score * x); the experts live on shards."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        weights: WeightReader,
        dispatcher: Dispatcher,
        kernels: Kernels,
        clock: StepClock,
    ) -> None:
        names = TensorNames(config)
        self._layer = layer
        self._experts_per_token = config.experts_per_token
        self._gate = kernels.linear(weights.read(names.layer(layer, "feed_forward.router.weight")))
        self.shared_expert = DenseMlp(names.layer(layer, "feed_forward.shared_expert"), weights, kernels)
        self._dispatcher = dispatcher
        self._mark = clock.mark

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        expert_TA, score_TA = choose_experts(self._gate(x_TD), self._experts_per_token)
        handle = self._dispatcher.dispatch(self._layer, x_TD, expert_TA, score_TA)
        self._mark(("other", perf_counter()))
        shared_TD = self.shared_expert(x_TD)  # while the rows travel and the shards compute
        self._mark(("expert_wait", perf_counter()))
        return shared_TD + self._dispatcher.combine(handle)

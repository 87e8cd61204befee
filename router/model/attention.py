"""Self-attention of one layer: rotary or NoPE, chunked or global.

Legend: T tokens of a step, D model width, J heads of queries, keys and values, C = head_dim columns.
"""

import torch

from checkpoint.config import ModelConfig
from checkpoint.layout import TensorNames
from checkpoint.weights import WeightReader
from kernels.cores import Cores
from kernels.cpu.streamed_linear import make_streamed
from router.model.heads import HeadAttention, HeadRules, StepPlan
from router.schedule.kv_layout import LayerLocation


class Attention:
    """One layer's attention, from normed hidden states to the projection's output."""

    def __init__(
        self, config: ModelConfig, layer: int, weights: WeightReader, head_attention: HeadAttention, cores: Cores
    ) -> None:
        names = TensorNames(config)
        self._layer = layer
        self._head_dim = config.head_dim
        self._rules = HeadRules.of(config, layer)
        self._head_attention = head_attention
        qkv = [weights.read(names.layer(layer, f"self_attn.{which}_proj.weight")) for which in "qkv"]
        self._qkv = make_streamed(torch.cat(qkv), cores)
        self._o = make_streamed(weights.read(names.layer(layer, "self_attn.o_proj.weight")), cores)

    def __call__(self, x_TD: torch.Tensor, step: StepPlan) -> torch.Tensor:
        qkv_TJC = self._qkv(x_TD).unflatten(-1, (-1, self._head_dim))
        location: LayerLocation = step.cache.layout.locations[self._layer]
        return self._o(self._head_attention(qkv_TJC, self._rules, location, step).flatten(1))

"""Self-attention of one layer: rotary or NoPE, chunked or global.

Legend: T tokens of a step, D model width, J heads of queries, keys and values,
C = head_dim columns.
"""

import torch

from checkpoint.config import ModelConfig
from checkpoint.layout import TensorNames
from checkpoint.weights import WeightReader
from kernels.kernels import Kernels
from router.model.heads import HeadRules, HeadStep


class Attention:
    """One layer's attention, from normed hidden states to the projection's output."""

    def __init__(self, config: ModelConfig, layer: int, weights: WeightReader, kernels: Kernels) -> None:
        names = TensorNames(config)
        self._layer = layer
        self._head_dim = config.head_dim
        self._rules = HeadRules.of(config, layer)
        qkv = [weights.read(names.layer(layer, f"self_attn.{which}_proj.weight")) for which in "qkv"]
        self._qkv = kernels.linear(torch.cat(qkv))
        self._o = kernels.linear(weights.read(names.layer(layer, "self_attn.o_proj.weight")))

    def __call__(self, x_TD: torch.Tensor, heads: HeadStep) -> torch.Tensor:
        qkv_TJC = self._qkv(x_TD).unflatten(-1, (-1, self._head_dim))
        return self._o(heads.attend(qkv_TJC, self._layer, self._rules).flatten(1))

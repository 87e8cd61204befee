"""Self-attention of one layer: rotary or NoPE, chunked or global.

Legend: T tokens of a step, D model width, H query heads, K key/value heads, C = head_dim columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from checkpoint.config import ModelConfig
from checkpoint.layout import TensorNames
from experts.linear import make_linear
from router.kv_cache import KvCache, Span, TablePlan
from router.paged_attention import paged_attention
from router.rope import rotate
from router.weights import WeightReader


@dataclass(frozen=True)
class StepPlan:
    """What every layer needs to know of a step, computed once per step.

    rotation: complex64 [T, C / 2]. temperature_T: fp32 factor on the queries of NoPE layers, or None.
    tables: one for each block table of the cache.
    """

    spans: Sequence[Span]
    rotation: torch.Tensor
    temperature_T: torch.Tensor | None
    cache: KvCache
    tables: Sequence[TablePlan]


def query_temperature(config: ModelConfig, position_T: torch.Tensor) -> torch.Tensor:
    """Factor on NoPE queries, fp32 [T]: 1 + attn_scale * ln(floor((p + 1) / floor_scale) + 1)."""
    return 1.0 + config.attn_scale * torch.log1p(torch.floor((position_T.float() + 1.0) / config.floor_scale))


def qk_norm(x_THC: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm over each head's columns, without weights; in fp32, returned in x's dtype."""
    x = x_THC.float()
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)).type_as(x_THC)


class Attention:
    """One layer's attention, from normed hidden states to the projection's output."""

    def __init__(self, config: ModelConfig, layer: int, weights: WeightReader) -> None:
        names = TensorNames(config)
        self._config = config
        self._layer = layer
        self._uses_rope = config.layers[layer].uses_rope
        self._has_qk_norm = config.use_qk_norm and self._uses_rope
        self._has_temperature = config.attn_temperature_tuning and not self._uses_rope
        qkv = [weights.read(names.layer(layer, f"self_attn.{which}_proj.weight")) for which in "qkv"]
        self._qkv = make_linear(torch.cat(qkv))
        self._o = make_linear(weights.read(names.layer(layer, "self_attn.o_proj.weight")))

    def __call__(self, x_TD: torch.Tensor, step: StepPlan) -> torch.Tensor:
        config = self._config
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        q_THC, k_TKC, v_TKC = self._qkv(x_TD).unflatten(-1, (sum(heads), config.head_dim)).split(heads, dim=1)
        # The order is the model's: rotate, then norm, then temperature. The cached key is rotated and normed.
        if self._uses_rope:
            q_THC, k_TKC = rotate(q_THC, step.rotation), rotate(k_TKC, step.rotation)
        if self._has_qk_norm:
            q_THC, k_TKC = qk_norm(q_THC, config.rms_norm_eps), qk_norm(k_TKC, config.rms_norm_eps)
        if self._has_temperature:
            assert step.temperature_T is not None
            q_THC = (q_THC * step.temperature_T[:, None, None]).type_as(q_THC)
        place = step.cache.layout.places[self._layer]
        plan = step.tables[place.table]
        step.cache.store(place.index, plan, k_TKC, v_TKC)
        out_THC = paged_attention(q_THC, k_TKC, v_TKC, step.cache, place.index, plan, step.spans)
        return self._o(out_THC.flatten(1))

"""Self-attention of one layer: rotary or NoPE, chunked or global.

Legend: T tokens of a step, D model width, H query heads, K key/value heads, G = H / K, S cached positions,
C = head_dim columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from checkpoint.config import ModelConfig
from checkpoint.layout import TensorNames
from experts.linear import make_linear
from router.kv_cache import SequenceCache
from router.rope import rotate
from router.weights import WeightReader


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one sequence within a step, all in one attention chunk."""

    cache: SequenceCache
    first_position: int
    length: int


@dataclass(frozen=True)
class StepPositions:
    """What every layer needs to know of a step's positions, computed once per step.

    rotation: complex64 [T, C / 2]. temperature_T: fp32 factor on the queries of NoPE layers, or None.
    """

    spans: Sequence[Span]
    rotation: torch.Tensor
    temperature_T: torch.Tensor | None


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

    def __call__(self, x_TD: torch.Tensor, step: StepPositions) -> torch.Tensor:
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
        out_THC = torch.empty_like(q_THC)
        begin = 0
        for span in step.spans:
            rows = slice(begin, begin + span.length)
            k_KSC, v_KSC = span.cache.layers[self._layer].append(span.first_position, k_TKC[rows], v_TKC[rows])
            out_THC[rows] = causal_attention(q_THC[rows], k_KSC, v_KSC)
            begin = rows.stop
        return self._o(out_THC.flatten(1))


def causal_attention(q_THC: torch.Tensor, k_KSC: torch.Tensor, v_KSC: torch.Tensor) -> torch.Tensor:
    """out_THC: the T queries belong to the last T of the S keys; each sees the keys up to its own."""
    num_tokens, num_heads, head_dim = q_THC.shape
    num_kv_heads, num_keys, _ = k_KSC.shape
    # The G query heads of one key/value head become further queries of it: keys and values are read once, without
    # the copies that a grouped-query mode makes (16 ms against 4 at 32 streams).
    q_KQC = q_THC.view(num_tokens, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3).flatten(1, 2)
    mask_QS = None
    if num_tokens > 1:
        query_T = torch.arange(num_keys - num_tokens, num_keys, device=q_THC.device)
        mask_TS = torch.arange(num_keys, device=q_THC.device)[None, :] <= query_T[:, None]
        mask_QS = mask_TS.repeat(num_heads // num_kv_heads, 1)
    out_KQC = F.scaled_dot_product_attention(q_KQC[None], k_KSC[None], v_KSC[None], attn_mask=mask_QS)[0]
    out_KGTC = out_KQC.view(num_kv_heads, -1, num_tokens, head_dim)
    return out_KGTC.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, head_dim)

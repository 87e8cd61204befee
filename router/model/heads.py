"""Attention of a layer's heads over the KV cache: the interface, and plain torch.

TorchHeads defines what is computed. CpuHeads (router/model/cpu_heads.py) is faster on a CPU and
must match it.

Legend: T tokens of a step, H query heads, K key/value heads, J = H + 2 K, G = H / K, S cached
positions, Q = G * T queries of one key/value head, U units of the pool, P positions of a block,
C = head_dim columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from checkpoint.config import ModelConfig
from kernels.kernels import Kernels
from router.model.kv_cache import KvCache, KvPools, Span, TablePlan
from router.model.rope import rotate
from router.schedule.kv_layout import KvLayout


@dataclass(frozen=True)
class HeadRules:
    """What a layer does to its queries and keys before their product.

    uses_rope: rotate both by their position. qk_norm_eps: then norm both, or None.
    has_temperature: scale queries by a factor that grows with their position.
    """

    uses_rope: bool
    qk_norm_eps: float | None
    has_temperature: bool

    @classmethod
    def of(cls, config: ModelConfig, layer: int) -> "HeadRules":
        uses_rope = config.layers[layer].uses_rope
        return cls(
            uses_rope,
            config.rms_norm_eps if config.use_qk_norm and uses_rope else None,
            config.attn_temperature_tuning and not uses_rope,
        )


@dataclass(frozen=True)
class StepPlan:
    """What every layer needs to know of a step, computed once per step.

    rotation: complex64 [T, C / 2]. temperature_T: fp32 factor on NoPE layers' queries, or None.
    tables: one for each block table of the cache.
    """

    spans: Sequence[Span]
    rotation: torch.Tensor
    temperature_T: torch.Tensor | None
    cache: KvCache
    tables: Sequence[TablePlan]


class HeadStep(Protocol):
    """A model's heads during one step."""

    def attend(self, qkv_TJC: torch.Tensor, layer: int, rules: HeadRules) -> torch.Tensor:
        """out_THC, after storing the step's keys and values of this layer. qkv_TJC may be
        overwritten."""
        ...


class HeadAttention(Protocol):
    """Chosen once, when a model is constructed.

    It knows how keys and values lie in memory, and remembers no step.
    """

    def new_pools(self, layout: KvLayout, num_units: int) -> KvPools:
        """Empty keys and values of num_units units."""
        ...

    def begin(self, step: StepPlan) -> HeadStep:
        """Work out what all layers need of a step.

        The step's cache must hold pools of this object's.
        """
        ...


class TorchHeads:
    """Plain torch, on any device: each span's blocks are copied together, then attended to."""

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        self._kv_heads, self._head_dim = config.num_kv_heads, config.head_dim
        self._kernels = kernels

    def new_pools(self, layout: KvLayout, num_units: int) -> KvPools:
        """Keys and values lie as [U, K, P, C]. They begin as zeros, because 0 times NaN is NaN."""
        shape = num_units, self._kv_heads, layout.block_tokens, self._head_dim
        keys, values = ([self._kernels.zeros(*shape) for _ in range(layout.layers_per_unit)] for _ in range(2))
        return KvPools(keys, values)

    def begin(self, step: StepPlan) -> "TorchHeadStep":
        return TorchHeadStep(step)


class TorchHeadStep:
    """One step of TorchHeads."""

    def __init__(self, step: StepPlan) -> None:
        self._step = step

    def attend(self, qkv_TJC: torch.Tensor, layer: int, rules: HeadRules) -> torch.Tensor:
        step = self._step
        location = step.cache.layout.locations[layer]
        keys_UKPC, values_UKPC = step.cache.pools.keys[location.index], step.cache.pools.values[location.index]
        kv_heads = keys_UKPC.shape[1]
        q_THC, k_TKC, v_TKC = qkv_TJC.split((qkv_TJC.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
        # The order is the model's: rotate, then norm, then temperature. The cached key is rotated
        # and normed.
        if rules.uses_rope:
            q_THC, k_TKC = rotate(q_THC, step.rotation), rotate(k_TKC, step.rotation)
        if rules.qk_norm_eps is not None:
            q_THC, k_TKC = qk_norm(q_THC, rules.qk_norm_eps), qk_norm(k_TKC, rules.qk_norm_eps)
        if rules.has_temperature:
            assert step.temperature_T is not None
            q_THC = (q_THC * step.temperature_T[:, None, None]).type_as(q_THC)
        plan = step.tables[location.table]
        store(keys_UKPC, plan, k_TKC)
        store(values_UKPC, plan, v_TKC)
        out_THC, begin = torch.empty_like(q_THC), 0
        for n, span in enumerate(step.spans):
            rows = slice(begin, begin + span.length)
            out_THC[rows] = causal_attention(q_THC[rows], gather(keys_UKPC, plan, n), gather(values_UKPC, plan, n))
            begin = rows.stop
        return out_THC


def store(pool_UKPC: torch.Tensor, plan: TablePlan, x_TKC: torch.Tensor) -> None:
    """Keep a step's keys, or values, in the plan's units. Storing them again is harmless."""
    pool_UKPC[plan.unit_T, :, plan.offset_T] = x_TKC


def gather(pool_UKPC: torch.Tensor, plan: TablePlan, span: int) -> torch.Tensor:
    """x_KSC: a copy of the keys, or values, that span number `span` sees, in order."""
    num_keys, block_tokens = int(plan.keys_N[span]), pool_UKPC.shape[2]
    return pool_UKPC[plan.blocks_NB[span, : -(-num_keys // block_tokens)]].transpose(0, 1).flatten(1, 2)[:, :num_keys]


def query_temperature(config: ModelConfig, position_T: torch.Tensor) -> torch.Tensor:
    """Factor on NoPE queries, fp32 [T]: 1 + attn_scale * ln(floor((p + 1) / floor_scale) + 1)."""
    return 1.0 + config.attn_scale * torch.log1p(torch.floor((position_T.float() + 1.0) / config.floor_scale))


def qk_norm(x_THC: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm over each head's columns, without weights; in fp32, returned in x's dtype."""
    x = x_THC.float()
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)).type_as(x_THC)


def causal_attention(q_THC: torch.Tensor, k_KSC: torch.Tensor, v_KSC: torch.Tensor) -> torch.Tensor:
    """out_THC: the T queries are the last T keys' own; each sees the keys up to its own."""
    num_tokens, num_heads, _ = q_THC.shape
    num_keys = k_KSC.shape[1]
    mask_QS = None
    if num_tokens > 1:
        query_T = torch.arange(num_keys - num_tokens, num_keys, device=q_THC.device)
        mask_TS = torch.arange(num_keys, device=q_THC.device)[None, :] <= query_T[:, None]
        mask_QS = mask_TS.repeat(num_heads // len(k_KSC), 1)
    q_KQC = _fold(q_THC, len(k_KSC))
    out_KQC = F.scaled_dot_product_attention(q_KQC[None], k_KSC[None], v_KSC[None], attn_mask=mask_QS)[0]
    return _unfold(out_KQC, num_tokens)


def _fold(q_THC: torch.Tensor, kv_heads: int) -> torch.Tensor:
    # The G query heads of one key/value head become further queries of it: keys and values are
    # read once, without the copies that a grouped-query mode makes (16 ms against 4 at 32
    # streams).
    num_tokens, num_heads, head_dim = q_THC.shape
    q_TKGC = q_THC.reshape(num_tokens, kv_heads, num_heads // kv_heads, head_dim)
    return q_TKGC.permute(1, 2, 0, 3).flatten(1, 2)


def _unfold(out_KQC: torch.Tensor, num_tokens: int) -> torch.Tensor:
    kv_heads, num_queries, head_dim = out_KQC.shape
    out_KGTC = out_KQC.reshape(kv_heads, num_queries // num_tokens, num_tokens, head_dim)
    return out_KGTC.permute(2, 0, 1, 3).flatten(1, 2)

"""From a layer's projected queries, keys and values to what its heads see, over keys and values that lie in blocks.

Two implementations of one interface: PlainAttention says in torch what is computed, on any device; CpuAttention is the
fast one on a CPU and must match it.

Legend: T tokens of a step, H query heads, K key/value heads, J = H + 2 K, G = H / K, S cached positions, Q = G * T
queries of one key/value head, C = head_dim columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint.config import ModelConfig
from kernels.cores import Cores
from kernels.cpu.numerics import as_numpy
from kernels.cpu.paged_attention import GROUP, attend, fits_tiles
from kernels.cpu.prepare_heads import prepare
from router.model.kv_cache import KvCache, Span, TablePlan
from router.model.rope import rotate
from router.schedule.kv_layout import LayerLocation

# Fewer numbers than this are not worth another thread.
WORTH_A_THREAD = 2**16
_NO_TEMPERATURE = np.empty(0, np.float32)


@dataclass(frozen=True)
class HeadRules:
    """What a layer does to its queries and keys before they meet.

    uses_rope: they are turned by their position. qk_norm_eps: then normed, or None. has_temperature: queries are
    scaled by their position.
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

    rotation: complex64 [T, C / 2]. temperature_T: fp32 factor on the queries of NoPE layers, or None.
    tables: one for each block table of the cache.
    """

    spans: Sequence[Span]
    rotation: torch.Tensor
    temperature_T: torch.Tensor | None
    cache: KvCache
    tables: Sequence[TablePlan]


class HeadAttention(Protocol):
    """Chosen once, at construction of a model."""

    def __call__(
        self, qkv_TJC: torch.Tensor, rules: HeadRules, location: LayerLocation, step: StepPlan
    ) -> torch.Tensor:
        """out_THC; the step's keys and values are then stored in its cache. qkv_TJC may be overwritten."""
        ...


class PlainAttention:
    """Each span's blocks are copied together, then attended to."""

    def __call__(
        self, qkv_TJC: torch.Tensor, rules: HeadRules, location: LayerLocation, step: StepPlan
    ) -> torch.Tensor:
        kv_heads = step.cache.num_kv_heads
        q_THC, k_TKC, v_TKC = qkv_TJC.split((qkv_TJC.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
        # The order is the model's: rotate, then norm, then temperature. The cached key is rotated and normed.
        if rules.uses_rope:
            q_THC, k_TKC = rotate(q_THC, step.rotation), rotate(k_TKC, step.rotation)
        if rules.qk_norm_eps is not None:
            q_THC, k_TKC = qk_norm(q_THC, rules.qk_norm_eps), qk_norm(k_TKC, rules.qk_norm_eps)
        if rules.has_temperature:
            assert step.temperature_T is not None
            q_THC = (q_THC * step.temperature_T[:, None, None]).type_as(q_THC)
        plan = step.tables[location.table]
        step.cache.store(location.index, plan, k_TKC, v_TKC)
        out_THC, begin = torch.empty_like(q_THC), 0
        for n, span in enumerate(step.spans):
            rows = slice(begin, begin + span.length)
            k_KSC, v_KSC = step.cache.gather(location.index, plan, n, int(plan.keys_N[n]))
            out_THC[rows] = causal_attention(q_THC[rows], k_KSC, v_KSC)
            begin = rows.stop
        return out_THC


def query_temperature(config: ModelConfig, position_T: torch.Tensor) -> torch.Tensor:
    """Factor on NoPE queries, fp32 [T]: 1 + attn_scale * ln(floor((p + 1) / floor_scale) + 1)."""
    return 1.0 + config.attn_scale * torch.log1p(torch.floor((position_T.float() + 1.0) / config.floor_scale))


def qk_norm(x_THC: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm over each head's columns, without weights; in fp32, returned in x's dtype."""
    x = x_THC.float()
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)).type_as(x_THC)


def causal_attention(q_THC: torch.Tensor, k_KSC: torch.Tensor, v_KSC: torch.Tensor) -> torch.Tensor:
    """out_THC: the T queries belong to the last T of the S keys; each sees the keys up to its own."""
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
    # The G query heads of one key/value head become further queries of it: keys and values are read once, without
    # the copies that a grouped-query mode makes (16 ms against 4 at 32 streams).
    num_tokens, num_heads, head_dim = q_THC.shape
    q_TKGC = q_THC.reshape(num_tokens, kv_heads, num_heads // kv_heads, head_dim)
    return q_TKGC.permute(1, 2, 0, 3).flatten(1, 2)


def _unfold(out_KQC: torch.Tensor, num_tokens: int) -> torch.Tensor:
    kv_heads, num_queries, head_dim = out_KQC.shape
    out_KGTC = out_KQC.reshape(kv_heads, num_queries // num_tokens, num_tokens, head_dim)
    return out_KGTC.permute(2, 0, 1, 3).flatten(1, 2)


@dataclass(frozen=True)
class _CpuStep:
    """What `prepare` and `attend` need to know of a step, whatever the layer; they explain it.

    pools: keys and values of each layer of a unit.
    """

    step: StepPlan
    uses_tiles: bool
    pools: Sequence[tuple[np.ndarray, np.ndarray]]
    rotation: np.ndarray
    temperature: np.ndarray | None
    begin_N: np.ndarray
    length_N: np.ndarray
    span_I: np.ndarray
    first_I: np.ndarray

    @classmethod
    def of(cls, step: StepPlan, sharers: int) -> "_CpuStep":
        """sharers: query heads of one key/value head."""
        length_N = np.array([span.length for span in step.spans])
        count_N = -(-length_N * sharers // GROUP)
        span_I = np.repeat(np.arange(len(step.spans)), count_N)
        first_I = (np.arange(len(span_I)) - np.repeat(np.cumsum(count_N) - count_N, count_N)) * GROUP
        cache = step.cache
        is_bf16 = cache.k_UKPC[0].dtype == torch.bfloat16
        return cls(
            step,
            is_bf16 and fits_tiles(cache.layout.block_tokens, cache.k_UKPC[0].shape[3]),
            [(as_numpy(k), as_numpy(v)) for k, v in zip(cache.k_UKPC, cache.v_UKCP, strict=True)],
            torch.view_as_real(step.rotation).flatten(1).numpy(),
            None if step.temperature_T is None else step.temperature_T.numpy(),
            np.cumsum(length_N) - length_N,
            length_N,
            span_I,
            first_I,
        )


class CpuAttention:
    """Reads keys and values where they lie (kernels/cpu/paged_attention.py)."""

    def __init__(self, cores: Cores) -> None:
        self._cores = cores
        self._step: _CpuStep | None = None

    @staticmethod
    def supports(dtype: torch.dtype, device: torch.device) -> bool:
        return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)

    def __call__(
        self, qkv_TJC: torch.Tensor, rules: HeadRules, location: LayerLocation, step: StepPlan
    ) -> torch.Tensor:
        plan, kv_heads = step.tables[location.table], step.cache.num_kv_heads
        num_tokens, num_all_heads, columns = qkv_TJC.shape
        heads = num_all_heads - 2 * kv_heads
        if self._step is None or self._step.step is not step:
            self._step = _CpuStep.of(step, heads // kv_heads)
        of_step, qkv = self._step, as_numpy(qkv_TJC)
        k_pool, v_pool = of_step.pools[location.index]
        temperature = of_step.temperature if rules.has_temperature else _NO_TEMPERATURE
        self._share(
            num_tokens,
            qkv.size,
            lambda counter: prepare(
                counter,
                qkv,
                kv_heads,
                rules.uses_rope,
                of_step.rotation,
                np.float32(rules.qk_norm_eps or 0.0),
                temperature,
                plan.unit_T.numpy(),
                plan.slot_T.numpy(),
                k_pool,
                v_pool,
            ),
        )
        out_THC = torch.empty(num_tokens, heads, columns, dtype=qkv_TJC.dtype)
        out = as_numpy(out_THC)
        self._share(
            len(of_step.span_I) * kv_heads,
            int((plan.keys_N * of_step.length_N).sum()) * heads * columns,
            lambda counter: attend(
                counter,
                of_step.uses_tiles,
                qkv,
                k_pool,
                v_pool,
                plan.blocks_NB,
                plan.keys_N,
                of_step.begin_N,
                of_step.length_N,
                of_step.span_I,
                of_step.first_I,
                np.float32(columns**-0.5),
                out,
            ),
        )
        return out_THC

    def _share(self, count: int, numbers: int, work: Callable[[np.ndarray], None]) -> None:
        """work(counter) for `count` items, on several cores if it is worth while."""
        counter = np.zeros(1, np.int64)
        self._cores.run(lambda: work(counter), min(count, 1 + numbers // WORTH_A_THREAD))

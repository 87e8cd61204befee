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
from experts.cores import Cores
from experts.numerics import as_numpy
from router.cpu_kernels import attend, copy_blocks, prepare
from router.kv_cache import KvCache, Span, TablePlan
from router.kv_layout import LayerPlace
from router.rope import rotate

# Fewer numbers than this are not worth waking a second thread (20 us).
WORTH_A_THREAD = 2**16


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

    def __call__(self, qkv_TJC: torch.Tensor, rules: HeadRules, place: LayerPlace, step: StepPlan) -> torch.Tensor:
        """out_THC; the step's keys and values are then stored in its cache. qkv_TJC may be overwritten."""
        ...


class PlainAttention:
    """Each span's blocks are copied together, then attended to."""

    def __call__(self, qkv_TJC: torch.Tensor, rules: HeadRules, place: LayerPlace, step: StepPlan) -> torch.Tensor:
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
        plan = step.tables[place.table]
        step.cache.store(place.index, plan, k_TKC, v_TKC)
        out_THC, begin = torch.empty_like(q_THC), 0
        for n, span in enumerate(step.spans):
            rows = slice(begin, begin + span.length)
            k_KSC, v_KSC = step.cache.gather(place.index, plan, n, int(plan.keys_N[n]))
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


class CpuAttention:
    """Single tokens read keys and values where they lie; a span of a prompt copies its past together once."""

    def __init__(self, cores: Cores) -> None:
        self._cores = cores

    @staticmethod
    def supports(dtype: torch.dtype, device: torch.device) -> bool:
        return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)

    def __call__(self, qkv_TJC: torch.Tensor, rules: HeadRules, place: LayerPlace, step: StepPlan) -> torch.Tensor:
        cache, plan = step.cache, step.tables[place.table]
        num_tokens, columns = len(qkv_TJC), qkv_TJC.shape[2]
        kv_heads = cache.num_kv_heads
        heads = qkv_TJC.shape[1] - 2 * kv_heads
        qkv = as_numpy(qkv_TJC)
        k_pool, v_pool = as_numpy(cache.k_UKPC[place.index]), as_numpy(cache.v_UKCP[place.index])
        rotation = torch.view_as_real(step.rotation).flatten(1).numpy()
        temperature = np.empty(0, np.float32)
        if rules.has_temperature:
            assert step.temperature_T is not None
            temperature = step.temperature_T.numpy()
        unit_T, slot_T = plan.unit_T.numpy(), plan.slot_T.numpy()
        eps = np.float32(rules.qk_norm_eps or 0.0)
        self._share(
            num_tokens,
            qkv.size,
            lambda counter: prepare(
                counter, qkv, kv_heads, rules.uses_rope, rotation, eps, temperature, unit_T, slot_T, k_pool, v_pool
            ),
        )
        out_THC = torch.empty(num_tokens, heads, columns, dtype=qkv_TJC.dtype)
        singles = next((n for n, span in enumerate(step.spans) if span.length > 1), len(step.spans))
        if singles:
            out, scale = as_numpy(out_THC), np.float32(columns**-0.5)
            self._share(
                singles * kv_heads,
                int(plan.keys_N[:singles].sum()) * (heads + kv_heads) * columns // 2,
                lambda counter: attend(
                    counter, qkv[:singles, :heads], k_pool, v_pool, plan.blocks_NB, plan.keys_N, scale, out
                ),
            )
        begin = singles
        for n in range(singles, len(step.spans)):
            rows = slice(begin, begin + step.spans[n].length)
            q_THC, k_TKC, v_TKC = qkv_TJC[rows].split((heads, kv_heads, kv_heads), dim=1)
            past = int(plan.keys_N[n]) - step.spans[n].length
            past_keys = (
                self._copied(plan.blocks_NB[n, : cache.layout.blocks(past)], past, k_pool, v_pool) if past else None
            )
            out_THC[rows] = span_attention(q_THC, k_TKC, v_TKC, past_keys)
            begin = rows.stop
        return out_THC

    def _copied(
        self, block_B: np.ndarray, num_keys: int, k_pool: np.ndarray, v_pool: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(k_KSC, v_KSC): the first num_keys positions of the blocks, as KvCache.gather gives them."""
        kv_heads, columns = k_pool.shape[1], k_pool.shape[3]
        k_KSC, v_KSC = (np.empty((kv_heads, num_keys, columns), k_pool.dtype) for _ in range(2))
        self._share(
            len(block_B) * kv_heads,
            k_KSC.size,
            lambda counter: copy_blocks(counter, block_B, k_pool, v_pool, k_KSC, v_KSC),
        )
        return _as_torch(k_KSC), _as_torch(v_KSC)

    def _share(self, count: int, numbers: int, work: Callable[[np.ndarray], None]) -> None:
        """work(counter) for `count` items, on several cores if it reads or writes many numbers."""
        counter = np.zeros(1, np.int64)
        self._cores.run(lambda: work(counter), min(count, 1 + numbers // WORTH_A_THREAD))


def _as_torch(x: np.ndarray) -> torch.Tensor:
    """The same memory; uint16 as bf16."""
    tensor = torch.from_numpy(x)
    return tensor.view(torch.bfloat16) if x.dtype == np.uint16 else tensor


def span_attention(
    q_THC: torch.Tensor,
    k_TKC: torch.Tensor,
    v_TKC: torch.Tensor,
    past: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """out_THC: what `causal_attention` gives for the past (k_KSC, v_KSC) and then the span's own keys, on a CPU.

    The past needs no mask and the span itself is plain causal, so no mask of T * S is made; the two are joined by
    their logarithmic sums of weights, as in FlashAttention (Dao et al. 2022).
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    kv_heads, group = k_TKC.shape[1], q_THC.shape[1] // k_TKC.shape[1]
    q_HTC = q_THC.transpose(0, 1)
    k_HTC, v_HTC = (x_TKC.transpose(0, 1).repeat_interleave(group, dim=0) for x_TKC in (k_TKC, v_TKC))
    own_HTC: torch.Tensor
    own_HTC, own_logsum_HT = (x[0] for x in flash(q_HTC[None], k_HTC[None], v_HTC[None], is_causal=True))
    if past is None:
        return own_HTC.transpose(0, 1)
    k_KSC, v_KSC = past
    past_KQC, past_logsum_KQ = (x[0] for x in flash(_fold(q_THC, kv_heads)[None], k_KSC[None], v_KSC[None]))
    past_HTC, past_logsum_HT = past_KQC.view_as(own_HTC), past_logsum_KQ.reshape(own_logsum_HT.shape)
    share_HT1 = torch.sigmoid(past_logsum_HT - own_logsum_HT)[:, :, None]
    out_HTC = torch.lerp(own_HTC.float(), past_HTC.float(), share_HT1).type_as(q_THC)
    return out_HTC.transpose(0, 1)

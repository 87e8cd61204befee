"""Attention of a step's queries over keys and values that lie in blocks.

Legend: T tokens of a step, N spans, H query heads, K key/value heads, G = H / K, S cached positions, Q = G * T queries
of one key/value head, C = head_dim columns.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from router.kv_cache import KvCache, Span, TablePlan


def paged_attention(
    q_THC: torch.Tensor,
    k_TKC: torch.Tensor,
    v_TKC: torch.Tensor,
    cache: KvCache,
    index: int,
    plan: TablePlan,
    spans: Sequence[Span],
) -> torch.Tensor:
    """out_THC: each token sees what its span sees, up to itself. k_TKC, v_TKC: the step's own, already stored.

    index: of the layer within the plan's units.
    """
    return paged_attention_reference(q_THC, cache, index, plan, spans)


def paged_attention_reference(
    q_THC: torch.Tensor, cache: KvCache, index: int, plan: TablePlan, spans: Sequence[Span]
) -> torch.Tensor:
    """The slow twin that `paged_attention` must match: each span's blocks are copied together, then attended to."""
    out_THC, begin = torch.empty_like(q_THC), 0
    for n, span in enumerate(spans):
        rows = slice(begin, begin + span.length)
        out_THC[rows] = causal_attention(q_THC[rows], *cache.gather(index, plan, n, int(plan.keys_N[n])))
        begin = rows.stop
    return out_THC


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

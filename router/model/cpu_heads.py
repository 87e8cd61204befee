"""The heads on a CPU: keys and values are read in their blocks, by compiled loops.

Legend: T tokens of a step, N spans, H query heads, K key/value heads, J = H + 2 K, U units of the
pool, P positions of a block, C = head_dim columns.
"""

import numpy as np
import torch

from checkpoint.config import ModelConfig
from kernels.arrays import as_numpy
from kernels.attention_loops import AttentionLoops, QueryGroups
from kernels.kernels import Kernels
from router.model.heads import HeadRules, StepPlan
from router.model.kv_cache import KvPools
from router.schedule.kv_layout import KvLayout


class CpuHeads:
    """Matches TorchHeads. Its kernels must have attention loops."""

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        assert kernels.attention_loops is not None
        self._heads, self._kv_heads, self._head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self._kernels = kernels
        self._loops = kernels.attention_loops

    def new_pools(self, layout: KvLayout, num_units: int) -> KvPools:
        """Keys lie as [U, K, P, C], values as [U, K, C, P].

        So both products with queries run along the last axis.
        They begin as zeros, because 0 times NaN is NaN.
        """
        units, positions = (num_units, self._kv_heads), layout.block_tokens
        return KvPools(
            [self._kernels.zeros(*units, positions, self._head_dim) for _ in range(layout.layers_per_unit)],
            [self._kernels.zeros(*units, self._head_dim, positions) for _ in range(layout.layers_per_unit)],
        )

    def begin(self, step: StepPlan) -> "CpuHeadStep":
        return CpuHeadStep(step, self._loops, self._heads // self._kv_heads)


class CpuHeadStep:
    """One step of CpuHeads: what the loops need of it, whatever the layer, as NumPy arrays."""

    def __init__(self, step: StepPlan, loops: AttentionLoops, queries_per_key: int) -> None:
        self._loops = loops
        self._locations = step.cache.layout.locations
        self._tables = [
            (plan.unit_T.numpy(), plan.offset_T.numpy(), plan.blocks_NB.numpy(), plan.keys_N) for plan in step.tables
        ]
        self._keys = [as_numpy(pool) for pool in step.cache.pools.keys]
        self._values = [as_numpy(pool) for pool in step.cache.pools.values]
        self._rotation_TC = torch.view_as_real(step.rotation).flatten(1).numpy()
        self._temperature_T = None if step.temperature_T is None else step.temperature_T.numpy()
        self._groups = QueryGroups.of(np.array([span.length for span in step.spans]), queries_per_key)

    def attend(self, qkv_TJC: torch.Tensor, layer: int, rules: HeadRules) -> torch.Tensor:
        location = self._locations[layer]
        unit_T, offset_T, blocks_NB, keys_N = self._tables[location.table]
        k_UKPC, v_UKCP = self._keys[location.index], self._values[location.index]
        num_tokens, num_all_heads, head_dim = qkv_TJC.shape
        qkv = as_numpy(qkv_TJC)
        self._loops.prepare(
            qkv,
            rotation_TC=self._rotation_TC if rules.uses_rope else None,
            norm_eps=rules.qk_norm_eps,
            temperature_T=self._temperature_T if rules.has_temperature else None,
            unit_T=unit_T,
            offset_T=offset_T,
            k_UKPC=k_UKPC,
            v_UKCP=v_UKCP,
        )
        out_THC = torch.empty(num_tokens, num_all_heads - 2 * k_UKPC.shape[1], head_dim, dtype=qkv_TJC.dtype)
        self._loops.attend(qkv, self._groups, k_UKPC, v_UKCP, blocks_NB, keys_N, as_numpy(out_THC))
        return out_THC

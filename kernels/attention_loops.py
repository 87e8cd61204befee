"""Attention over keys and values in blocks: the compiled loops of kernels/cpu, shared by cores.

Legend: T tokens of a step, N spans, I groups of queries, H query heads, K key/value heads,
J = H + 2 K, G = H / K, U units of the pool, P positions of a block, B blocks of a sequence,
C = head_dim columns.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kernels.cores import Cores
from kernels.cpu.paged_attention import GROUP, attend, fits_tiles
from kernels.cpu.prepare_heads import prepare

# Another core gains from this many numbers on.
WORTH_A_THREAD = 2**16
_NO_ROTATION, _NO_TEMPERATURE = np.empty((0, 0), np.float32), np.empty(0, np.float32)


@dataclass(frozen=True)
class QueryGroups:
    """A step's queries in groups that pass the blocks together.

    length_N, begin_N: the spans' tokens. Group i has queries first_I[i] .. first_I[i] + GROUP - 1
    of span span_I[i], as far as there are so many.
    """

    length_N: np.ndarray
    begin_N: np.ndarray
    span_I: np.ndarray
    first_I: np.ndarray

    @classmethod
    def of(cls, length_N: np.ndarray, queries_per_token: int) -> "QueryGroups":
        """queries_per_token: G, the query heads of one key/value head. [1, 20], 5 -> spans 0 1 1,
        firsts 0 0 64."""
        count_N = -(-length_N * queries_per_token // GROUP)
        span_I = np.repeat(np.arange(len(length_N)), count_N)
        first_I = (np.arange(len(span_I)) - np.repeat(np.cumsum(count_N) - count_N, count_N)) * GROUP
        return cls(length_N, np.cumsum(length_N) - length_N, span_I, first_I)


class AttentionLoops:
    """bf16, seen as uint16, or fp32. Keys lie as [U, K, P, C], values as [U, K, C, P]."""

    def __init__(self, cores: Cores, has_tiles: bool) -> None:
        """has_tiles: whether to use the processor's bf16 tiles where blocks and heads fit them."""
        self._cores = cores
        self._has_tiles = has_tiles

    def uses_tiles(self, block_tokens: int, head_dim: int) -> bool:
        return self._has_tiles and fits_tiles(block_tokens, head_dim)

    def prepare(
        self,
        qkv_TJC: np.ndarray,
        *,
        rotation_TC: np.ndarray | None,
        norm_eps: float | None,
        temperature_T: np.ndarray | None,
        unit_T: np.ndarray,
        offset_T: np.ndarray,
        k_UKPC: np.ndarray,
        v_UKCP: np.ndarray,
    ) -> None:
        """Rotate, norm and scale queries and keys in place, as far as arguments are given; store
        keys and values."""
        norm = np.float32(norm_eps or 0.0)
        rotation = _NO_ROTATION if rotation_TC is None else rotation_TC
        temperature = _NO_TEMPERATURE if temperature_T is None else temperature_T

        def work(counter: np.ndarray) -> None:
            prepare(counter, qkv_TJC, rotation, norm, temperature, unit_T, offset_T, k_UKPC, v_UKCP)

        self._share(len(qkv_TJC), qkv_TJC.size, work)

    def attend(
        self,
        qkv_TJC: np.ndarray,
        groups: QueryGroups,
        k_UKPC: np.ndarray,
        v_UKCP: np.ndarray,
        blocks_NB: np.ndarray,
        keys_N: np.ndarray,
        out_THC: np.ndarray,
    ) -> None:
        """Put into out_THC what queries that `prepare` has made see of the first keys_N positions
        in their blocks."""
        kv_heads, block_tokens, columns = k_UKPC.shape[1:]
        uses_tiles, scale = self.uses_tiles(block_tokens, columns), np.float32(columns**-0.5)

        def work(counter: np.ndarray) -> None:
            attend(
                counter,
                uses_tiles,
                qkv_TJC,
                k_UKPC,
                v_UKCP,
                blocks_NB,
                keys_N,
                groups.begin_N,
                groups.length_N,
                groups.span_I,
                groups.first_I,
                scale,
                out_THC,
            )

        numbers = int((keys_N * groups.length_N).sum()) * out_THC.shape[1] * columns
        self._share(len(groups.span_I) * kv_heads, numbers, work)

    def _share(self, items: int, numbers: int, work: Callable[[np.ndarray], None]) -> None:
        """Run work(counter) for all items, on several cores if so many numbers are worth it."""
        counter = np.zeros(1, np.int64)
        self._cores.run(lambda: work(counter), min(items, 1 + numbers // WORTH_A_THREAD))

"""The keys and values of one sequence. They never leave the router, so losing a shard loses nothing.

Legend: T tokens, K key/value heads, S cached positions, C = head_dim columns.
"""

import torch

from checkpoint.config import ModelConfig


class LayerCache:
    """One layer's keys and values: all positions, or in a chunked layer those of the current attention chunk.

    A position p lies in slot p % capacity. A span of tokens never crosses a chunk border (Model.spans sees to
    it), so a span's slots are contiguous, the slots before it hold exactly what it may see of the past, and the next
    chunk simply overwrites this one.
    """

    def __init__(self, config: ModelConfig, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_kv_heads, capacity, config.head_dim)
        self._k_KSC = torch.empty(shape, dtype=dtype, device=device)
        self._v_KSC = torch.empty(shape, dtype=dtype, device=device)
        self._capacity = capacity

    def append(
        self, first_position: int, k_TKC: torch.Tensor, v_TKC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a span and return (k_KSC, v_KSC): all that its last token sees; its first token sees S - T + 1.

        Storing the same span again is harmless: a step may be repeated.
        """
        begin = first_position % self._capacity
        end = begin + len(k_TKC)
        assert end <= self._capacity, f"span {begin}:{end} crosses the border at {self._capacity}"
        self._k_KSC[:, begin:end] = k_TKC.transpose(0, 1)
        self._v_KSC[:, begin:end] = v_TKC.transpose(0, 1)
        return self._k_KSC[:, :end], self._v_KSC[:, :end]


class SequenceCache:
    """The layers' caches of one sequence of at most `max_positions` tokens (config.kv_bytes says how many bytes)."""

    def __init__(self, config: ModelConfig, max_positions: int, dtype: torch.dtype, device: torch.device) -> None:
        chunk = min(config.attention_chunk_size, max_positions)
        self.layers = [
            LayerCache(config, chunk if layer.is_chunked else max_positions, dtype, device) for layer in config.layers
        ]

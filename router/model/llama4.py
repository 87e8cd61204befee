"""The model without its routed experts.

Embedding, attention, dense and shared MLPs, expert gates, output head.

Legend: T tokens of a step, D model width, R rows whose logits are wanted, V vocabulary.
"""

from collections.abc import Sequence
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint.config import ModelConfig
from checkpoint.layout import TensorNames
from checkpoint.weights import WeightReader
from kernels.kernels import Kernels
from kernels.memory import peak_bytes
from kernels.upload import upload
from router.counts.step_clock import Phase, StepClock
from router.model.attention import Attention
from router.model.cpu_heads import CpuHeads
from router.model.dispatch import Dispatcher
from router.model.heads import HeadAttention, HeadStep, StepPlan, TorchHeads, query_temperature
from router.model.kv_cache import KvCache, Span
from router.model.moe import DenseMlp, MoeMlp
from router.model.rope import rope_frequencies, rotations
from router.schedule.block_table import TableEntry
from router.schedule.kv_layout import KvLayout

# Of the past that `Model.step_bytes` measures with. Attention copies a span's keys and values, layer by layer.
MEASURED_POSITIONS = 2**15


class Layer:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        weights: WeightReader,
        dispatcher: Dispatcher,
        kernels: Kernels,
        clock: StepClock,
    ) -> None:
        self._mark = clock.mark
        self._mlp_phase: Phase = "dispatch" if config.layers[index].is_moe else "other"
        names = TensorNames(config)
        self._attention_norm = kernels.norm(
            weights.read(names.layer(index, "input_layernorm.weight")), config.rms_norm_eps
        )
        self._attention = Attention(config, index, weights, kernels)
        self._mlp_norm = kernels.norm(
            weights.read(names.layer(index, "post_attention_layernorm.weight")), config.rms_norm_eps
        )
        self._mlp = (
            MoeMlp(config, index, weights, dispatcher, kernels, clock)
            if config.layers[index].is_moe
            else DenseMlp(names.layer(index, "feed_forward"), weights, kernels)
        )

    def __call__(self, x_TD: torch.Tensor, heads: HeadStep) -> torch.Tensor:
        self._mark(("attention", perf_counter()))
        x_TD = self.attend(x_TD, heads)
        self._mark((self._mlp_phase, perf_counter()))
        return x_TD + self._mlp(self._mlp_norm(x_TD))

    @property
    def own_mlp(self) -> DenseMlp:
        """The part of the second half that needs no shard."""
        return self._mlp.shared_expert if isinstance(self._mlp, MoeMlp) else self._mlp

    def attend(self, x_TD: torch.Tensor, heads: HeadStep) -> torch.Tensor:
        """The first half, which needs no shard."""
        return x_TD + self._attention(self._attention_norm(x_TD), heads)


class Model:
    """A Llama 4 text model whose routed experts are reached through a dispatcher."""

    def __init__(self, config: ModelConfig, weights: WeightReader, dispatcher: Dispatcher, kernels: Kernels) -> None:
        """weights: must give tensors of the kernels' dtype, on their device."""
        names = TensorNames(config)
        self.config = config
        self.dtype = kernels.dtype
        self.kv_layout = KvLayout.of(config, kernels.dtype.itemsize)
        self.clock = StepClock()
        self.dispatcher = dispatcher
        self.threads = kernels.cores.threads
        self._device = kernels.device
        self._heads: HeadAttention = (TorchHeads if kernels.attention_loops is None else CpuHeads)(config, kernels)
        self._frequencies = rope_frequencies(config).to(kernels.device)
        self._embedding_VD = weights.read(names.embedding)
        self._layers = [
            Layer(config, index, weights, dispatcher, kernels, self.clock) for index in range(config.num_layers)
        ]
        self._final_norm = kernels.norm(weights.read(names.final_norm), config.rms_norm_eps)
        lm_head_VD = self._embedding_VD if config.tie_word_embeddings else weights.read(names.lm_head)
        self._lm_head = kernels.linear(lm_head_VD)
        self._warm_up()

    def _warm_up(self) -> None:
        """Run a few tokens through what needs no shard, so that loops are compiled now and not in
        a request."""
        cache = self.new_cache(self.kv_layout, 1, 1)  # every block table begins with unit 0
        # One stream, then two of them beside a piece of a prompt with a past, if a block holds so
        # many tokens.
        for spans in ([Span(0, 0, 1)], [Span(0, 0, 1), Span(0, 1, 1), Span(0, 2, 2)]):
            num_tokens = sum(span.length for span in spans)
            if num_tokens > self.kv_layout.block_tokens:
                continue
            self._run_without_shards(spans, cache)

    @torch.inference_mode()
    def _run_without_shards(self, spans: Sequence[Span], cache: KvCache) -> None:
        """A step of some tokens through what needs no shard, and the logits of the last 64."""
        arrays = [_positions(spans), np.zeros(sum(span.length for span in spans), np.int64)]
        position_T, token_id_T = upload(arrays, self._device)
        heads = self._heads.begin(self._plan(spans, position_T, cache))
        x_TD = F.embedding(token_id_T, self._embedding_VD)
        for layer in self._layers:
            x_TD = layer.attend(x_TD, heads)
            layer.own_mlp(x_TD)
        self.logits(x_TD[-64:])

    def step_bytes(self, num_tokens: int, max_positions: int) -> int | None:
        """What a step of so many tokens takes on a GPU beside weights and cache; None on a CPU.

        Measured with one sequence that is max_positions long, but at most MEASURED_POSITIONS.
        """
        layout, end = self.kv_layout, min(max_positions, MEASURED_POSITIONS)
        end = end // layout.chunk_tokens * layout.chunk_tokens or end
        longest = min(end, layout.chunk_tokens)
        lengths = [longest] * (num_tokens // longest) + [num_tokens % longest] * (num_tokens % longest > 0)
        cache = self.new_cache(layout, 1, 1)  # every entry of every block table is unit 0
        cache.assign(0, [TableEntry(0, layout.blocks(end) - 1, (0,))])
        spans = [Span(0, end - length, length) for length in lengths]
        return peak_bytes(self._device, lambda: self._run_without_shards(spans, cache))

    def new_cache(self, layout: KvLayout, num_units: int, max_sequences: int) -> KvCache:
        """An empty KV cache of num_units units for up to max_sequences sequences at once."""
        return KvCache(layout, max_sequences, self._heads.new_pools(layout, num_units), self._device)

    @torch.inference_mode()
    def forward(
        self, token_ids: Sequence[int], spans: Sequence[Span], cache: KvCache, rows: Sequence[int]
    ) -> torch.Tensor:
        """Run one step and return the hidden states x_RD of its `rows`, which `logits` takes.

        token_ids: the spans' tokens, one span after the other. The tokens' keys and values are
        stored in `cache`, whose block tables must have room for them. Raises TokensFailed,
        and what a waiting dispatcher is told to raise; the same step may then be run again.
        """
        assert sum(span.length for span in spans) == len(token_ids)
        arrays = [np.array(token_ids, np.int64), _positions(spans), np.array(rows, np.int64)]
        token_id_T, position_T, row_R = upload(arrays, self._device)
        heads = self._heads.begin(self._plan(spans, position_T, cache))
        x_TD = F.embedding(token_id_T, self._embedding_VD)
        with self.dispatcher.step():
            for layer in self._layers:
                x_TD = layer(x_TD, heads)
        return x_TD[row_R]

    def _plan(self, spans: Sequence[Span], position_T: torch.Tensor, cache: KvCache) -> StepPlan:
        temperature_T = query_temperature(self.config, position_T) if self.config.attn_temperature_tuning else None
        return StepPlan(spans, rotations(self._frequencies, position_T), temperature_T, cache, cache.plan(spans))

    @torch.inference_mode()
    def logits(self, x_RD: torch.Tensor) -> torch.Tensor:
        """logits_RV, fp32, of rows that `forward` returned; apart from it, since many rows' would
        take much memory."""
        return self._lm_head(self._final_norm(x_RD)).float()


def _positions(spans: Sequence[Span]) -> np.ndarray:
    """Each token's position in its sequence, int64 [T]."""
    return np.concatenate([np.arange(s.first_position, s.first_position + s.length) for s in spans])

"""The model without its routed experts: embedding, attention, dense and shared MLPs, expert gates, output head.

Legend: T tokens of a step, D model width, R rows whose logits are wanted, V vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from checkpoint.config import ModelConfig
from checkpoint.layout import TensorNames
from experts.linear import make_linear
from router.attention import Attention, Span, StepPositions, query_temperature
from router.dispatch import Dispatcher
from router.kv_cache import SequenceCache
from router.moe import DenseMlp, MoeMlp
from router.rope import rope_frequencies, rotations
from router.weights import WeightReader


class RmsNorm:
    """x / rms(x) * weight; normed in fp32 and cast back before the weight is applied, as transformers does."""

    def __init__(self, weight_D: torch.Tensor, eps: float) -> None:
        self._weight_D = weight_D
        self._eps = eps

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        x = x_TD.float()
        return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self._eps)).type_as(x_TD) * self._weight_D


class Layer:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, index: int, weights: WeightReader, dispatcher: Dispatcher) -> None:
        names = TensorNames(config)
        self._attention_norm = RmsNorm(weights.read(names.layer(index, "input_layernorm.weight")), config.rms_norm_eps)
        self._attention = Attention(config, index, weights)
        self._mlp_norm = RmsNorm(
            weights.read(names.layer(index, "post_attention_layernorm.weight")), config.rms_norm_eps
        )
        self._mlp = (
            MoeMlp(config, index, weights, dispatcher)
            if config.layers[index].is_moe
            else DenseMlp(names.layer(index, "feed_forward"), weights)
        )

    def __call__(self, x_TD: torch.Tensor, step: StepPositions) -> torch.Tensor:
        x_TD = x_TD + self._attention(self._attention_norm(x_TD), step)
        return x_TD + self._mlp(self._mlp_norm(x_TD))


class Model:
    """A Llama 4 text model whose routed experts are reached through a dispatcher."""

    def __init__(self, config: ModelConfig, weights: WeightReader, dispatcher: Dispatcher) -> None:
        names = TensorNames(config)
        self.config = config
        self.dtype = weights.dtype
        self._device = weights.device
        self._frequencies = rope_frequencies(config).to(weights.device)
        self._embedding_VD = weights.read(names.embedding)
        self._layers = [Layer(config, index, weights, dispatcher) for index in range(config.num_layers)]
        self._final_norm = RmsNorm(weights.read(names.final_norm), config.rms_norm_eps)
        self._lm_head = make_linear(self._embedding_VD if config.tie_word_embeddings else weights.read(names.lm_head))

    def new_cache(self, max_positions: int) -> SequenceCache:
        """An empty KV cache for one sequence of at most max_positions tokens."""
        return SequenceCache(self.config, max_positions, self.dtype, self._device)

    def spans(self, cache: SequenceCache, first_position: int, length: int) -> list[Span]:
        """A sequence's consecutive tokens as spans that do not cross attention chunk borders."""
        chunk, spans = self.config.attention_chunk_size, []
        while length:
            part = min(length, chunk - first_position % chunk)
            spans.append(Span(cache, first_position, part))
            first_position, length = first_position + part, length - part
        return spans

    @torch.inference_mode()
    def forward(self, token_ids: Sequence[int], spans: Sequence[Span], wanted_rows: Sequence[int]) -> torch.Tensor:
        """Run one step and return x_RD, for `logits`, of the rows of the step named in wanted_rows.

        token_ids: the spans' tokens, one span after the other. The tokens' keys and values are stored in the spans'
        caches. Raises ShardUnavailable, after which the same step may be run again.
        """
        positions = [p for span in spans for p in range(span.first_position, span.first_position + span.length)]
        assert len(positions) == len(token_ids)
        position_T = torch.tensor(positions, device=self._device)
        temperature_T = query_temperature(self.config, position_T) if self.config.attn_temperature_tuning else None
        step = StepPositions(spans, rotations(self._frequencies, position_T), temperature_T)
        x_TD = F.embedding(torch.tensor(token_ids, device=self._device), self._embedding_VD)
        for layer in self._layers:
            x_TD = layer(x_TD, step)
        return x_TD[torch.tensor(wanted_rows, dtype=torch.int64, device=self._device)]

    @torch.inference_mode()
    def logits(self, x_RD: torch.Tensor) -> torch.Tensor:
        """logits_RV, fp32, of rows that `forward` returned; apart from it, since many rows' would take much memory."""
        return self._lm_head(self._final_norm(x_RD)).float()

"""Who computes a step: the model and its KV cache in this process, or later a gang of processes.

Legend: R rows whose logits are wanted, D model width, V vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from router.model.llama4 import Model
from router.request import TokenLogprobs
from router.sampling.logprobs import RowFailed, finite_rows, token_logprobs
from router.sampling.sampler import sample
from router.sampling.state import SamplingState
from router.schedule.kv_layout import KvLayout
from router.step import PromptRows, StepInput, StepOutput

# Logits of a prompt that exist at once. 64 rows of 202,048 in fp32 are 52 MB.
PROMPT_LOGIT_ROWS = 64


class Runner(Protocol):
    """Owns a model and its KV cache."""

    def run(self, step: StepInput, states: Sequence[SamplingState]) -> StepOutput:
        """Compute a step.

        states: of step.sample's requests, in that order; they are read, not changed.

        Raises TokensFailed. The keys and values of a step that failed are worthless, those of
        others are not.
        """
        ...


MakeRunner = Callable[[Model, KvLayout, int, int], Runner]
"""make_runner(model, layout, num_units, max_sequences): see Model.new_cache."""


class LocalRunner:
    """Runs steps in the calling thread."""

    def __init__(self, model: Model, layout: KvLayout, num_units: int, max_sequences: int) -> None:
        self._model = model
        self._cache = model.new_cache(layout, num_units, max_sequences)

    def run(self, step: StepInput, states: Sequence[SamplingState]) -> StepOutput:
        x_RD = self.forward(step)
        self._model.clock.mark(("sample", time.perf_counter()))
        sampling = len(step.sample.rows)
        sampled = sample(self._model.logits(x_RD[:sampling]), states, step.sample.positions) if sampling else []
        return StepOutput(sampled, self._prompt_logprobs(x_RD[sampling:], step.prompt))

    def forward(self, step: StepInput) -> torch.Tensor:
        """x_RD of step.sample's rows, then of step.prompt's, as Model.forward returns them.

        Fills the KV cache.
        """
        for row, entries in step.table_changes:
            self._cache.assign(row, entries)
        return self._model.forward(step.token_ids, step.spans, self._cache, step.sample.rows + step.prompt.rows)

    def _prompt_logprobs(self, x_RD: torch.Tensor, prompt: PromptRows) -> list[TokenLogprobs | RowFailed]:
        entries: list[TokenLogprobs | RowFailed] = []
        for first in range(0, len(prompt.rows), PROMPT_LOGIT_ROWS):
            part = slice(first, first + PROMPT_LOGIT_ROWS)
            logits_RV, failures = finite_rows(self._model.logits(x_RD[part]))
            told = token_logprobs(logits_RV, prompt.token_ids[part], prompt.tops[part])
            entries += [failures.get(row, entry) for row, entry in enumerate(told)]
        return entries

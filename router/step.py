"""One step of the model as data: what the scheduler's work comes to, and what comes out of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from router.model.kv_cache import Span
from router.request import TokenLogprobs
from router.sampling.logprobs import RowFailed
from router.sampling.sampler import SampledToken
from router.sampling.state import SamplingState
from router.schedule.block_table import TableEntry
from router.schedule.sequence import Work


@dataclass(frozen=True)
class SampleRows:
    """Where new tokens come from, one entry per sampling request.

    rows: indices into the step's tokens. positions: of the new tokens in their sequences, prompt
    included.
    """

    request_ids: tuple[str, ...]
    rows: tuple[int, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True)
class PromptRows:
    """Prompt positions whose log-probabilities were asked for.

    rows: indices into the step's tokens, each of the token before such a position. token_ids: the
    tokens at these positions. tops: how many of the most likely alternatives each wants. counts:
    how many of the rows are each span's.
    """

    rows: tuple[int, ...]
    token_ids: tuple[int, ...]
    tops: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class StepInput:
    """What the model computes in a step, as plain data that can travel: forward pass, KV cache, and rows of logits.

    What it leaves out is drawing tokens from these logits. Sampling states stay with the engine,
    which hands them to its own runner. A process that follows learns the drawn tokens from the
    next step's token_ids.

    token_ids: the spans' tokens, one span after the other.
    table_changes: (row of the block tables, its changed entries), to be made before the step.
    """

    token_ids: tuple[int, ...]
    spans: tuple[Span, ...]
    table_changes: tuple[tuple[int, tuple[TableEntry, ...]], ...]
    sample: SampleRows
    prompt: PromptRows


@dataclass(frozen=True)
class StepOutput:
    """sampled: one token per entry of StepInput.sample.

    prompt_logprobs: one entry per row of StepInput.prompt.
    """

    sampled: Sequence[SampledToken | RowFailed]
    prompt_logprobs: Sequence[TokenLogprobs | RowFailed]


def assemble(works: Sequence[Work], states: Mapping[str, SamplingState]) -> StepInput:
    """The step that computes `works`, in their order. states: of all requests, by id."""
    token_ids: list[int] = []
    spans, changes = [], []
    sampling: list[str] = []
    rows: list[int] = []
    positions: list[int] = []
    prompt_rows: list[int] = []
    prompt_ids: list[int] = []
    tops: list[int] = []
    counts: list[int] = []
    for work in works:
        sequence, request = work.sequence, work.sequence.request
        asked, top = _prompt_positions(work, states[request.request_id]), request.sampling.prompt_logprobs
        counts.append(len(asked))
        if asked and top is not None:
            prompt_rows += [len(token_ids) + position - 1 - work.first for position in asked]
            prompt_ids += request.prompt_token_ids[asked.start : asked.stop]
            tops += [top] * len(asked)
        if work.new_entries:
            changes.append((sequence.table_row, work.new_entries))
        token_ids += sequence.token_ids[work.first : work.first + work.length]
        spans.append(Span(sequence.table_row, work.first, work.length))
        if work.samples:
            sampling.append(request.request_id)
            rows.append(len(token_ids) - 1)
            positions.append(work.first + work.length)
    return StepInput(
        tuple(token_ids),
        tuple(spans),
        tuple(changes),
        SampleRows(tuple(sampling), tuple(rows), tuple(positions)),
        PromptRows(tuple(prompt_rows), tuple(prompt_ids), tuple(tops), tuple(counts)),
    )


def _prompt_positions(work: Work, state: SamplingState) -> range:
    """The prompt's positions whose log-probabilities `work` is the first to tell; position 0 has
    none."""
    request = work.sequence.request
    if request.sampling.prompt_logprobs is None:
        return range(0)
    first = max(work.first + 1, state.prompt_logprobs_told)
    return range(first, min(work.first + work.length + 1, len(request.prompt_token_ids)))

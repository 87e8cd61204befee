"""A step as data, by hand; and a process that follows it from that data alone."""

import pickle
from collections.abc import Iterator

import pytest
import torch

from router.model.kv_cache import Span
from router.model.llama4 import Model
from router.request import GenerationRequest
from router.runner import LocalRunner
from router.sampling.state import SamplingState
from router.schedule.kv_layout import KvLayout
from router.schedule.scheduler import Scheduler
from router.step import PromptRows, SampleRows, StepInput, assemble
from tests.local_model import load_model
from tests.reference import Reference, prompt
from tests.router.engines import (
    COMPANY,
    NUM_SHARDS,
    drawn,
    make_engine,
    make_scheduler,
    request,
    run_step,
    run_to_end,
    tokens_of,
)


def assembled(scheduler: Scheduler, *requests: GenerationRequest, told: int = 0) -> StepInput:
    """The next step. told: of each prompt, how many positions have had their log-probabilities told."""
    states = {each.request_id: SamplingState(each.sampling, each.prompt_token_ids, ()) for each in requests}
    for state in states.values():
        state.prompt_logprobs_told = told
    return assemble(scheduler.schedule(), states)


def test_a_step_of_a_prompt_and_a_decoding_sequence() -> None:
    a, b = request("a", [11, 12, 13]), request("b", [21, 22])
    scheduler = make_scheduler()
    scheduler.enqueue(a)
    run_step(scheduler, token_id=14)
    scheduler.enqueue(b)
    step = assembled(scheduler, a, b)
    assert step.token_ids == (14, 21, 22)
    [row_a, row_b] = [span.table_row for span in step.spans]
    assert step.spans == (Span(row_a, 3, 1), Span(row_b, 0, 2))
    assert row_a != row_b
    assert step.sample == SampleRows(("a", "b"), rows=(0, 2), positions=(4, 2))
    assert step.prompt == PromptRows((), (), (), (0, 0))
    [(row, entries)] = step.table_changes  # the third and fourth token of a lie in a block that it has
    assert row == row_b
    assert len(entries) == 1


def test_a_piece_of_a_prompt_samples_nothing() -> None:
    a = request("a", range(100, 110))
    scheduler = make_scheduler(max_step_tokens=4)
    scheduler.enqueue(a)
    assert assembled(scheduler, a).sample == SampleRows((), (), ())


@pytest.mark.parametrize(
    ("told", "rows", "token_ids"), [(0, (0, 1, 2, 3), (101, 102, 103, 104)), (3, (2, 3), (103, 104))]
)
def test_prompt_logprobs_are_read_at_the_token_before(
    told: int, rows: tuple[int, ...], token_ids: tuple[int, ...]
) -> None:
    a = request("a", range(100, 110), prompt_logprobs=2)
    scheduler = make_scheduler(max_step_tokens=4)
    scheduler.enqueue(a)
    assert assembled(scheduler, a, told=told).prompt == PromptRows(rows, token_ids, (2,) * len(rows), (len(rows),))


def test_the_last_piece_of_a_prompt_tells_no_logprobs_of_what_follows_it() -> None:
    a = request("a", range(100, 104), prompt_logprobs=0)
    scheduler = make_scheduler()
    scheduler.enqueue(a)
    step = assembled(scheduler, a)
    assert step.prompt == PromptRows((0, 1, 2), (101, 102, 103), (0, 0, 0), (3,))
    assert step.sample.rows == (3,)


class FollowedRunner(LocalRunner):
    """Runs each step here, and its forward pass again on a follower, which has nothing but the step's bytes."""

    follower: Model

    def __init__(self, model: Model, layout: KvLayout, num_units: int, max_sequences: int) -> None:
        super().__init__(model, layout, num_units, max_sequences)
        self._following = LocalRunner(self.follower, layout, num_units, max_sequences)
        self.steps = 0

    def forward(self, step: StepInput) -> torch.Tensor:
        x_RD = super().forward(step)
        followed_RD = self._following.forward(pickle.loads(pickle.dumps(step)))
        assert torch.equal(followed_RD, x_RD)
        assert torch.equal(self.follower.logits(followed_RD), self._model.logits(x_RD))
        self.steps += 1
        return x_RD


@pytest.fixture
def follower(reference: Reference) -> Iterator[None]:
    FollowedRunner.follower = load_model(reference.directory, num_shards=NUM_SHARDS)
    yield
    del FollowedRunner.follower


@pytest.mark.usefixtures("follower")
def test_a_gang_can_follow_from_steps_alone(model: Model, greedy_tokens: dict[str, list[int]]) -> None:
    """Prompts in pieces, prefixes found, requests that give way: block tables and tokens travel with the steps.

    A hidden state of a decoded token reads all keys and values before it, so equal ones need an equal KV cache.
    """
    engine = make_engine(model, max_step_tokens=13, max_running=4, kv_positions=120, make_runner=FollowedRunner)
    for each in COMPANY:
        engine.submit(each)
    engine.submit(drawn("drawn", prompt(40, seed=40), 9, logprobs=2))
    engine.submit(drawn("told", prompt(20, seed=40), 5, prompt_logprobs=1))
    deltas = run_to_end(engine)
    assert {each.request_id: tokens_of(deltas, each.request_id) for each in COMPANY} == greedy_tokens
    assert isinstance(engine._runner, FollowedRunner)
    assert engine._runner.steps == engine.stats.steps

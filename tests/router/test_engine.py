"""The loop over a real model: every request gets what it would get alone, whatever happens to the others."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.tensors import Checkpoint
from experts.errors import LinkDown
from experts.link import ExpertRows, Link, LocalLink, Reply
from experts.placement import even_placement
from experts.shard import load_shard
from router.dispatch import Dispatcher
from router.engine import Engine, request_limits
from router.errors import ResourceExhausted, Unavailable
from router.kv_cache import SequenceCache
from router.model import Model
from router.request import FinishReason, GenerationRequest, SamplingParams, TokenDelta
from router.scheduler import SchedulerLimits
from router.weights import WeightReader
from tests.one_process import CPU, load_model
from tests.reference import Reference, make_reference, prompt

NUM_SHARDS = 3
MANY_STEPS = 2000


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """16 experts, attention chunks of 16 tokens."""
    return make_reference(tmp_path_factory.mktemp("scout"), "scout")


@pytest.fixture(scope="module")
def model(reference: Reference) -> Model:
    return load_model(reference.directory, num_shards=NUM_SHARDS)


def make_engine(
    model: Model,
    *,
    max_running: int = 8,
    max_waiting: int = 100,
    max_step_tokens: int = 64,
    kv_positions: int = 2000,
) -> Engine:
    """kv_positions: memory for one sequence of so many tokens."""
    kv_bytes = model.config.kv_bytes(kv_positions, model.dtype.itemsize)
    return Engine(model, SchedulerLimits(max_running, max_waiting, max_step_tokens, kv_bytes))


def greedy(name: str, prompt_token_ids: Iterable[int], max_tokens: int = 12, **sampling: Any) -> GenerationRequest:
    params = SamplingParams(max_tokens, **{"temperature": 0.0, **sampling})
    return GenerationRequest(name, tuple(prompt_token_ids), params)


def drawn(name: str, prompt_token_ids: Iterable[int], max_tokens: int = 12, **sampling: Any) -> GenerationRequest:
    return greedy(name, prompt_token_ids, max_tokens, **{"temperature": 1.0, "seed": 20260401, **sampling})


def run_to_end(engine: Engine) -> list[TokenDelta]:
    """All deltas of all requests, in order."""
    deltas = []
    for _ in range(MANY_STEPS):
        if not engine.has_work:
            return deltas
        deltas += engine.step()
    raise AssertionError(f"not done after {MANY_STEPS} steps")


def tokens_of(deltas: Iterable[TokenDelta], name: str) -> list[int]:
    return [token_id for delta in deltas if delta.request_id == name for token_id in delta.token_ids]


def finish_of(deltas: Iterable[TokenDelta], name: str) -> FinishReason | None:
    [last] = [delta for delta in deltas if delta.request_id == name and delta.is_last]
    return last.finish_reason


def alone(model: Model, request: GenerationRequest) -> list[int]:
    engine = make_engine(model)
    engine.submit(request)
    return tokens_of(run_to_end(engine), request.request_id)


COMPANY = [
    greedy(f"{length} tokens", prompt(length, seed=length), max_tokens)
    for length, max_tokens in ((1, 20), (5, 3), (16, 12), (17, 1), (40, 12), (33, 7))
]


@pytest.fixture(scope="module")
def greedy_tokens(reference: Reference) -> dict[str, list[int]]:
    """What transformers says to each request of COMPANY."""
    return {
        request.request_id: reference.greedy(list(request.prompt_token_ids), request.sampling.max_tokens)[0]
        for request in COMPANY
    }


@pytest.mark.parametrize("request_", COMPANY, ids=lambda request: request.request_id)
def test_a_request_alone_gets_transformers_tokens(
    model: Model, greedy_tokens: dict[str, list[int]], request_: GenerationRequest
) -> None:
    assert alone(model, request_) == greedy_tokens[request_.request_id]


@pytest.mark.parametrize("max_step_tokens", [6, 13, 512])
@pytest.mark.parametrize("max_running", [1, 3, 6])
def test_requests_in_company_get_the_tokens_they_get_alone(
    model: Model, greedy_tokens: dict[str, list[int]], max_step_tokens: int, max_running: int
) -> None:
    engine = make_engine(model, max_step_tokens=max_step_tokens, max_running=max_running)
    for request in COMPANY:
        engine.submit(request)
    deltas = run_to_end(engine)
    assert {request.request_id: tokens_of(deltas, request.request_id) for request in COMPANY} == greedy_tokens


def test_requests_that_come_while_others_run_get_the_same_tokens(
    model: Model, greedy_tokens: dict[str, list[int]]
) -> None:
    engine, deltas = make_engine(model, max_step_tokens=9), []
    for request in COMPANY:
        engine.submit(request)
        deltas += engine.step()
        deltas += engine.step()
    deltas += run_to_end(engine)
    assert {request.request_id: tokens_of(deltas, request.request_id) for request in COMPANY} == greedy_tokens


def test_an_idle_engine_does_nothing(model: Model) -> None:
    engine = make_engine(model)
    assert not engine.has_work
    assert engine.step() == []
    assert engine.stats.steps == 0


# How requests end.


def test_max_tokens_ends_a_request_by_length(model: Model) -> None:
    engine = make_engine(model)
    engine.submit(greedy("a", prompt(5), max_tokens=4))
    deltas = run_to_end(engine)
    assert finish_of(deltas, "a") is FinishReason.LENGTH
    assert len(tokens_of(deltas, "a")) == 4


def test_a_stop_token_ends_a_request_and_is_its_last_token(model: Model) -> None:
    tokens = alone(model, greedy("a", prompt(5)))
    stop = tokens[5]
    engine = make_engine(model)
    engine.submit(greedy("a", prompt(5), stop_token_ids=frozenset({stop})))
    deltas = run_to_end(engine)
    assert finish_of(deltas, "a") is FinishReason.STOP
    assert tokens_of(deltas, "a") == tokens[: tokens.index(stop) + 1]


def test_any_of_the_models_end_tokens_ends_a_request(reference: Reference, model: Model) -> None:
    tokens = alone(model, greedy("a", prompt(5)))
    engine = make_engine(load_model(reference.directory, eos_token_ids=(2, tokens[4])))
    engine.submit(greedy("a", prompt(5)))
    deltas = run_to_end(engine)
    assert finish_of(deltas, "a") is FinishReason.STOP
    assert tokens_of(deltas, "a") == tokens[: tokens.index(tokens[4]) + 1]


def test_an_end_token_in_the_prompt_ends_nothing(model: Model) -> None:
    [eos] = model.config.eos_token_ids
    assert len(alone(model, greedy("a", [5, eos, 6], max_tokens=3))) == 3


def test_every_request_ends_with_exactly_one_last_delta(model: Model) -> None:
    engine = make_engine(model, max_running=2, max_step_tokens=7)
    for request in COMPANY:
        engine.submit(request)
    ended = [delta.request_id for delta in run_to_end(engine) if delta.is_last]
    assert sorted(ended) == sorted(request.request_id for request in COMPANY)


# Memory.


def test_finished_requests_give_all_memory_back(model: Model) -> None:
    engine = make_engine(model)
    for request in COMPANY:
        engine.submit(request)
    engine.step()
    assert engine.stats.kv_bytes_used > 0
    run_to_end(engine)
    assert engine.stats.kv_bytes_used == 0


def test_cancelling_frees_memory_at_once_and_no_delta_follows(model: Model) -> None:
    engine = make_engine(model)
    engine.submit(greedy("a", prompt(5)))
    engine.step()
    engine.cancel("a")
    assert engine.stats.kv_bytes_used == 0
    assert engine.step() == []


def test_cancelling_one_request_leaves_the_others_tokens_alone(
    model: Model, greedy_tokens: dict[str, list[int]]
) -> None:
    engine = make_engine(model, max_step_tokens=20)
    cancelled, *others = COMPANY
    for request in COMPANY:
        engine.submit(request)
    deltas = engine.step()
    engine.cancel(cancelled.request_id)
    deltas += run_to_end(engine)
    assert all(tokens_of(deltas, other.request_id) == greedy_tokens[other.request_id] for other in others)


def test_cancelling_what_is_unknown_or_over_is_ignored(model: Model) -> None:
    engine = make_engine(model)
    engine.submit(greedy("a", prompt(5), max_tokens=1))
    run_to_end(engine)
    engine.cancel("a")
    engine.cancel("never heard of")
    assert engine.stats.kv_bytes_used == 0


def test_a_request_larger_than_all_memory_is_refused_and_the_others_go_on(model: Model) -> None:
    engine = make_engine(model, kv_positions=30)
    engine.submit(greedy("fits", prompt(18), max_tokens=12))
    with pytest.raises(ResourceExhausted, match=r"engine\.kv_bytes"):
        engine.submit(greedy("too large", prompt(19), max_tokens=12))
    assert len(tokens_of(run_to_end(engine), "fits")) == 12


def test_requests_that_do_not_fit_together_are_served_in_turn(
    model: Model, greedy_tokens: dict[str, list[int]]
) -> None:
    engine = make_engine(model, kv_positions=52)  # the largest request alone
    for request in COMPANY:
        engine.submit(request)
    deltas = run_to_end(engine)
    assert {request.request_id: tokens_of(deltas, request.request_id) for request in COMPANY} == greedy_tokens


class ShortOfMemory:
    """A model whose device has less memory than was configured: long caches cannot be made."""

    def __init__(self, model: Model, max_positions: int) -> None:
        self._model, self._max_positions = model, max_positions

    def new_cache(self, max_positions: int) -> SequenceCache:
        if max_positions > self._max_positions:
            raise torch.OutOfMemoryError
        return self._model.new_cache(max_positions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def test_a_request_whose_cache_cannot_be_made_ends_and_the_others_go_on(
    model: Model, greedy_tokens: dict[str, list[int]]
) -> None:
    engine = make_engine(ShortOfMemory(model, max_positions=51))  # type: ignore[arg-type]
    for request in COMPANY:
        engine.submit(request)
    deltas = run_to_end(engine)
    [failed] = [delta for delta in deltas if delta.error is not None]
    assert failed.request_id == "40 tokens"
    assert isinstance(failed.error, Unavailable)
    expected = {**greedy_tokens, "40 tokens": []}
    assert {request.request_id: tokens_of(deltas, request.request_id) for request in COMPANY} == expected


# Shards that fail.


class BrokenLink:
    """A link on which every request raises `error`. message: what a user is then told."""

    down_reason = "lost: the peer is gone"

    def __init__(self, error: Exception, message: str) -> None:
        self.message = message
        self._error = error

    def request(self, rows: ExpertRows) -> Reply:
        raise self._error

    def close(self) -> None:
        pass


BROKEN_LINKS = {
    "a dead shard": BrokenLink(LinkDown(BrokenLink.down_reason), "expert shard 1: lost: the peer is gone"),
    "a defect": BrokenLink(ZeroDivisionError("oh"), "the router failed in a step; its log says why"),
}


@pytest.fixture(params=BROKEN_LINKS)
def broken(request: pytest.FixtureRequest) -> BrokenLink:
    """What becomes of the link to shard 1."""
    return BROKEN_LINKS[request.param]


@pytest.fixture(scope="module")
def links(reference: Reference) -> list[Link]:
    """A link to each shard, all well."""
    checkpoint = Checkpoint.open(reference.directory)
    placement = even_placement(checkpoint.config.moe_layers, checkpoint.config.num_experts, NUM_SHARDS)
    return [
        LocalLink(load_shard(checkpoint, 1, placement.experts_of(shard), torch.float32, CPU))
        for shard in range(NUM_SHARDS)
    ]


def make_fragile(directory: Path, links: Sequence[Link], **limits: int) -> tuple[Engine, Dispatcher]:
    """An engine, and the dispatcher in which its links can be broken."""
    checkpoint = Checkpoint.open(directory)
    placement = even_placement(checkpoint.config.moe_layers, checkpoint.config.num_experts, NUM_SHARDS)
    dispatcher = Dispatcher(placement, links)
    fragile = Model(checkpoint.config, WeightReader(checkpoint, torch.float32, CPU), dispatcher)
    return make_engine(fragile, **limits), dispatcher


def test_a_broken_step_ends_its_requests_as_unavailable_and_says_why(
    reference: Reference, links: list[Link], broken: BrokenLink
) -> None:
    engine, dispatcher = make_fragile(reference.directory, links)
    dispatcher.links[1] = broken
    for name in "ab":
        engine.submit(greedy(name, prompt(20)))
    deltas = engine.step()
    assert [(delta.request_id, type(delta.error), str(delta.error)) for delta in deltas] == [
        (name, Unavailable, broken.message) for name in "ab"
    ]


def test_a_broken_step_frees_its_requests_memory(reference: Reference, links: list[Link], broken: BrokenLink) -> None:
    engine, dispatcher = make_fragile(reference.directory, links)
    engine.submit(greedy("a", prompt(20)))
    engine.step()
    dispatcher.links[1] = broken
    assert run_to_end(engine)[-1].error is not None
    assert engine.stats.kv_bytes_used == 0


def test_a_broken_step_leaves_waiting_requests_their_turn(
    reference: Reference, links: list[Link], greedy_tokens: dict[str, list[int]], broken: BrokenLink
) -> None:
    engine, dispatcher = make_fragile(reference.directory, links, max_running=1)
    first, second = COMPANY[-2:]
    engine.submit(first)
    engine.submit(second)
    dispatcher.links[1] = broken
    assert [delta.request_id for delta in engine.step()] == [first.request_id]
    dispatcher.links[1] = links[1]
    assert tokens_of(run_to_end(engine), second.request_id) == greedy_tokens[second.request_id]


def test_once_the_link_is_replaced_the_engine_goes_on(
    reference: Reference, links: list[Link], greedy_tokens: dict[str, list[int]], broken: BrokenLink
) -> None:
    engine, dispatcher = make_fragile(reference.directory, links)
    dispatcher.links[1] = broken
    engine.submit(greedy("lost", prompt(20)))
    run_to_end(engine)
    dispatcher.links[1] = links[1]
    for request in COMPANY:
        engine.submit(request)
    deltas = run_to_end(engine)
    assert {request.request_id: tokens_of(deltas, request.request_id) for request in COMPANY} == greedy_tokens


def test_failing_everything_ends_running_and_waiting_requests(model: Model) -> None:
    engine = make_engine(model, max_running=1)
    for name in "abc":
        engine.submit(greedy(name, prompt(5)))
    engine.step()
    deltas = engine.fail_all(Unavailable("the router is stopping"))
    assert [(delta.request_id, str(delta.error)) for delta in deltas] == [
        (name, "the router is stopping") for name in "abc"
    ]
    assert (engine.has_work, engine.stats.kv_bytes_used) == (False, 0)


# Sampling.


def test_drawn_tokens_differ_with_the_seed_and_from_greedy_ones(model: Model) -> None:
    answers = [alone(model, drawn("a", prompt(9), seed=seed)) for seed in (1, 2)]
    answers.append(alone(model, greedy("a", prompt(9))))
    assert len({tuple(tokens) for tokens in answers}) == 3


@pytest.mark.parametrize("max_step_tokens", [8, 64])
def test_a_seeded_request_draws_the_same_alone_and_in_company(model: Model, max_step_tokens: int) -> None:
    request = drawn("seeded", prompt(23), 20, top_k=50, top_p=0.95)
    engine = make_engine(model, max_step_tokens=max_step_tokens)
    engine.submit(drawn("other", prompt(7), 5, seed=3))
    engine.step()
    engine.submit(request)
    for other in COMPANY:
        engine.submit(other)
    assert tokens_of(run_to_end(engine), "seeded") == alone(model, request)


@pytest.mark.parametrize("made", [1, 7, 10, 19])
@pytest.mark.parametrize("resume", [greedy, drawn], ids=["greedy", "drawn"])
def test_a_request_resubmitted_with_its_tokens_so_far_goes_on_the_same(model: Model, made: int, resume: Any) -> None:
    """What a frontend does when a router dies; the cut may lie on either side of an attention chunk's border."""
    whole = alone(model, resume("a", prompt(9), 20))
    rest = alone(model, resume("a", [*prompt(9), *whole[:made]], 20 - made))
    assert rest == whole[made:]


def test_each_token_carries_the_logprobs_that_transformers_gives_it(reference: Reference, model: Model) -> None:
    tokens, logits = reference.greedy(list(prompt(9)), 6)
    engine = make_engine(model)
    engine.submit(greedy("a", prompt(9), 6, logprobs=3))
    logprobs = [delta.logprobs for delta in run_to_end(engine)]
    expected_TV = torch.log_softmax(logits, dim=-1)
    for place, [entry] in enumerate(logprobs):
        values, token_ids = expected_TV[place].topk(3)
        assert entry.token_id == tokens[place]
        assert entry.logprob == pytest.approx(float(values[0]), abs=1e-3)
        assert [token_id for token_id, _ in entry.top] == token_ids.tolist()
        assert [logprob for _, logprob in entry.top] == pytest.approx(values.tolist(), abs=1e-3)


def test_no_logprobs_are_sent_unless_asked_for(model: Model) -> None:
    engine = make_engine(model)
    engine.submit(greedy("a", prompt(9), 3))
    assert [delta.logprobs for delta in run_to_end(engine)] == [()] * 3


# What it tells about itself.


def test_stats_count_prompt_tokens_once_and_every_token_made(model: Model) -> None:
    engine = make_engine(model, max_step_tokens=10)
    engine.submit(greedy("a", prompt(25), max_tokens=4))
    run_to_end(engine)
    stats = engine.stats
    assert (stats.prompt_tokens, stats.generated_tokens, stats.steps) == (25, 4, 3 + 3)


def test_stats_tell_who_runs_who_waits_and_what_memory_they_hold(model: Model) -> None:
    engine = make_engine(model, max_running=1, kv_positions=100)
    for name in "abc":
        engine.submit(greedy(name, prompt(5), max_tokens=12))
    engine.step()
    stats = engine.stats
    assert (stats.running, stats.waiting) == (1, 2)
    assert stats.kv_bytes_used == model.config.kv_bytes(17, 4)
    assert stats.kv_bytes_total == model.config.kv_bytes(100, 4)


@pytest.mark.parametrize(("configured", "expected"), [(None, 512), (100, 100), (10**6, 512)])
def test_the_context_is_the_models_or_less(model: Model, configured: int | None, expected: int) -> None:
    limits = request_limits(model.config, configured)
    assert (limits.max_context_tokens, limits.vocab_size) == (expected, model.config.vocab_size)

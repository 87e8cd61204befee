"""The loop over a real model: every request gets what it would get alone, whatever happens to the others."""

from typing import Any

import pytest
import torch

from router.counts.requests import CANCELLED
from router.errors import ResourceExhausted
from router.model.llama4 import Model
from router.request import FinishReason, GenerationRequest, request_limits
from tests.local_model import load_model
from tests.reference import Reference, prompt
from tests.router.engines import (
    COMPANY,
    alone,
    counters_of,
    drawn,
    finish_of,
    greedy,
    make_engine,
    run_to_end,
    tokens_of,
)


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
    engine.cancel("a", CANCELLED)
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
    engine.cancel(cancelled.request_id, CANCELLED)
    deltas += run_to_end(engine)
    assert all(tokens_of(deltas, other.request_id) == greedy_tokens[other.request_id] for other in others)


def test_cancelling_what_is_unknown_or_over_is_ignored(model: Model) -> None:
    engine = make_engine(model)
    engine.submit(greedy("a", prompt(5), max_tokens=1))
    run_to_end(engine)
    engine.cancel("a", CANCELLED)
    engine.cancel("never heard of", CANCELLED)
    assert engine.stats.kv_bytes_used == 0


def test_a_request_larger_than_all_memory_is_refused_and_the_others_go_on(model: Model) -> None:
    engine = make_engine(model, kv_positions=32)  # 8 blocks
    engine.submit(greedy("fits", prompt(20), max_tokens=12))
    with pytest.raises(ResourceExhausted, match=r"come to 33 tokens.*engine\.kv_bytes"):
        engine.submit(greedy("too large", prompt(21), max_tokens=12))
    assert len(tokens_of(run_to_end(engine), "fits")) == 12


def test_a_full_queue_refuses_with_a_time_after_which_to_try_again(model: Model) -> None:
    engine = make_engine(model, max_waiting=1)
    engine.submit(greedy("waits", prompt(5)))
    with pytest.raises(ResourceExhausted, match=r"engine\.max_waiting") as refused:
        engine.submit(greedy("one too many", prompt(5)))
    assert refused.value.retry_after_s is not None
    assert refused.value.retry_after_s > 0


@pytest.mark.parametrize("make", [greedy, drawn])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_requests_that_give_way_when_memory_runs_out_get_the_tokens_they_get_alone(
    model: Model, make: Any, prefix_cache: bool
) -> None:
    requests = [make(f"{length} tokens", prompt(length, seed=length), 24) for length in (9, 14, 16, 21, 30)]
    engine = make_engine(model, kv_positions=56, prefix_cache=prefix_cache)
    for each in requests:
        engine.submit(each)
    deltas = run_to_end(engine)
    assert counters_of(engine).preemptions > 1
    assert {each.request_id: tokens_of(deltas, each.request_id) for each in requests} == {
        each.request_id: alone(model, each) for each in requests
    }


def test_64_requests_at_once_get_the_tokens_they_get_alone(model: Model) -> None:
    lengths = [1 + 7 * nth % 40 for nth in range(64)]
    requests = [greedy(f"{nth}", prompt(length, seed=nth), 4 + nth % 5) for nth, length in enumerate(lengths)]
    engine = make_engine(model, max_running=64, max_step_tokens=256, kv_positions=4000)
    for each in requests:
        engine.submit(each)
    deltas = run_to_end(engine)
    assert {each.request_id: tokens_of(deltas, each.request_id) for each in requests} == {
        each.request_id: alone(model, each) for each in requests
    }


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
    assert stats.kv_bytes_used == model.config.kv_bytes(8, 4)  # 5 tokens are computed, in 2 blocks of 4
    assert stats.kv_bytes_total == model.config.kv_bytes(100, 4)


@pytest.mark.parametrize(("configured", "expected"), [(None, 512), (100, 100), (10**6, 512)])
def test_the_context_is_the_models_or_less(model: Model, configured: int | None, expected: int) -> None:
    limits = request_limits(model.config, configured)
    assert (limits.max_context_tokens, limits.vocab_size) == (expected, model.config.vocab_size)
    assert limits.eos_token_ids == set(model.config.eos_token_ids) != set()

"""A request that another router has begun goes on here as if nothing had happened, wherever it was cut."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from router.model.llama4 import Model
from router.request import (
    LOST,
    RESUMED,
    SILENT,
    UNAVAILABLE,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TokenDelta,
    TokenLogprobs,
)
from router.sampling.noise import derived_seed
from router.sampling.state import SamplingState
from tests.reference import prompt
from tests.router.engines import COMPANY, drawn, finish_of, greedy, make_engine, run_to_end, tokens_of

PROMPT = prompt(13)  # an attention chunk of 16 ends after the third token made
TOKENS = 12
FAVOURED = ((77, 100.0), (78, 98.0), (79, 97.5))


@dataclass
class Completion:
    """What a client has got of a request, from one or two routers."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish: FinishReason | None

    @staticmethod
    def of(deltas: Sequence[TokenDelta], name: str = "a") -> "Completion":
        return Completion(
            tokens_of(deltas, name),
            [entry for delta in deltas if delta.request_id == name for entry in delta.logprobs],
            finish_of(deltas, name),
        )


def run(model: Model, request: GenerationRequest, *others: GenerationRequest, **limits: Any) -> list[TokenDelta]:
    engine = make_engine(model, **limits)
    for each in (*others, request):
        engine.submit(each)
    return run_to_end(engine)


REQUESTS = {
    "greedy": greedy("a", PROMPT, TOKENS),
    "seeded": drawn("a", PROMPT, TOKENS, top_k=50, top_p=0.95, min_p=0.001),
    "the third answer of several": drawn("a", PROMPT, TOKENS, seed=derived_seed(5, 2)),
    "repetition penalty": greedy("a", PROMPT, TOKENS, logit_bias=FAVOURED, repetition_penalty=1.02),
    "presence penalty": greedy("a", PROMPT, TOKENS, logit_bias=FAVOURED, presence_penalty=1.9),
    "frequency penalty": greedy("a", PROMPT, TOKENS, logit_bias=FAVOURED, frequency_penalty=0.5),
    "all penalties, drawn": drawn(
        "a", PROMPT, TOKENS, repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=-0.4, logprobs=2
    ),
    "min_tokens": greedy("a", PROMPT, TOKENS, logit_bias=((9, 100.0),), min_tokens=7, stop_token_ids=frozenset({9})),
    "logprobs": greedy("a", PROMPT, TOKENS, logprobs=3),
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_a_request_cut_at_any_token_goes_on_the_same_in_another_engine(
    model: Model, request_: GenerationRequest
) -> None:
    whole = Completion.of(run(model, request_))
    assert len(set(whole.token_ids)) > 1, "a completion of one token repeated tells nothing"
    for cut in range(len(whole.token_ids)):
        rest = Completion.of(run(model, replace(request_, made=tuple(whole.token_ids[:cut]))))
        assert rest.token_ids == whole.token_ids[cut:], f"cut after {cut} tokens"
        assert rest.finish is whole.finish
        for entry, expected in zip(rest.logprobs, whole.logprobs[cut:], strict=request_.sampling.logprobs is not None):
            assert (entry.token_id, [token_id for token_id, _ in entry.top]) == (
                expected.token_id,
                [token_id for token_id, _ in expected.top],
            )
            assert entry.logprob == pytest.approx(expected.logprob, abs=1e-4)


@pytest.mark.parametrize("name", ["repetition penalty", "presence penalty", "frequency penalty", "min_tokens"])
def test_a_sampler_that_forgot_what_was_made_would_be_found_out(
    model: Model, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    whole = tokens_of(run(model, REQUESTS[name]), "a")

    def forgetful(params: SamplingParams, prompt_ids: Sequence[int], eos: Sequence[int], made: object) -> SamplingState:
        return SamplingState(params, prompt_ids, eos)

    monkeypatch.setattr("router.engine.SamplingState", forgetful)
    cuts = range(1, len(whole))
    rests = [tokens_of(run(model, replace(REQUESTS[name], made=tuple(whole[:cut]))), "a") for cut in cuts]
    assert rests != [whole[cut:] for cut in cuts]


def test_a_stop_token_and_a_models_end_token_end_it_as_they_would_have(model: Model) -> None:
    whole = Completion.of(run(model, greedy("a", PROMPT, TOKENS))).token_ids
    stop = whole[8]
    request = greedy("a", PROMPT, TOKENS, stop_token_ids=frozenset({stop}))
    end = whole.index(stop) + 1
    for cut in range(end):
        rest = Completion.of(run(model, replace(request, made=tuple(whole[:cut]))))
        assert (rest.token_ids, rest.finish) == (whole[cut:end], FinishReason.STOP)


def test_deltas_say_where_in_the_completion_they_are(model: Model) -> None:
    whole = run(model, drawn("a", PROMPT, TOKENS))
    assert [delta.first for delta in whole] == [*range(TOKENS)]
    made = tuple(tokens_of(whole, "a")[:5])
    rest = run(model, replace(drawn("a", PROMPT, TOKENS), made=made))
    assert [(delta.first, delta.token_ids) for delta in rest] == [(delta.first, delta.token_ids) for delta in whole[5:]]


@pytest.mark.parametrize("max_step_tokens", [5, 64])
def test_a_resumed_request_goes_on_the_same_in_company(model: Model, max_step_tokens: int) -> None:
    request = REQUESTS["all penalties, drawn"]
    whole = tokens_of(run(model, request), "a")
    resumed = replace(request, made=tuple(whole[:6]))
    deltas = run(model, resumed, *COMPANY, max_step_tokens=max_step_tokens)
    assert tokens_of(deltas, "a") == whole[6:]


def test_a_resumed_request_that_gives_way_goes_on_the_same(model: Model) -> None:
    request = drawn("a", PROMPT, 24, frequency_penalty=0.5)
    whole = tokens_of(run(model, request), "a")
    engine = make_engine(model, kv_positions=56, prefix_cache=False)
    for each in (greedy("older", prompt(20, seed=1), 24), replace(request, made=tuple(whole[:9]))):
        engine.submit(each)
    assert tokens_of(run_to_end(engine), "a") == whole[9:]
    assert engine.stats.preemptions > 0


def test_the_prompts_logprobs_are_not_told_again(model: Model) -> None:
    request = greedy("a", PROMPT, TOKENS, prompt_logprobs=1)
    whole = run(model, request)
    assert sum(len(delta.prompt_logprobs) for delta in whole) == len(PROMPT)
    rest = run(model, replace(request, made=tuple(tokens_of(whole, "a")[:3])))
    assert tokens_of(rest, "a") == tokens_of(whole, "a")[3:]
    assert not any(delta.prompt_logprobs for delta in rest)


def test_a_resumed_request_finds_its_prefix_and_counts_no_more_than_its_prompt(model: Model) -> None:
    engine = make_engine(model)
    request = drawn("a", PROMPT, TOKENS)
    engine.submit(request)
    whole = tokens_of(run_to_end(engine), "a")
    engine.submit(replace(request, made=tuple(whole[:10])))
    deltas = run_to_end(engine)
    assert tokens_of(deltas, "a") == whole[10:]
    assert not any(delta.cached_tokens for delta in deltas)
    assert engine.stats.prefix_hit_tokens == len(PROMPT)


def test_requests_that_come_again_are_counted_by_reason(model: Model) -> None:
    engine = make_engine(model)
    engine.submit(drawn("first", PROMPT, 1))
    for reason in (LOST, LOST, SILENT):
        engine.submit(replace(drawn(f"{reason} {engine.stats.replayed}", PROMPT, 1), replayed=reason))
    assert engine.stats.replayed == 3
    assert engine.snapshot.requests.replayed == {LOST: 2, SILENT: 1, UNAVAILABLE: 0, RESUMED: 0}


def test_what_was_made_takes_no_more_of_the_context_than_it_would_have(model: Model) -> None:
    """max_tokens is of the whole completion, so a cut request needs the memory that the uncut one does."""
    request = greedy("a", PROMPT, TOKENS)
    whole = tokens_of(run(model, request, kv_positions=len(PROMPT) + TOKENS), "a")
    resumed = replace(request, made=tuple(whole[:-1]))
    assert tokens_of(run(model, resumed, kv_positions=len(PROMPT) + TOKENS), "a") == whole[-1:]

"""One request's numbers go wrong: it ends alone, says why, and leaves nothing behind that others could meet."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from router.engine import Engine
from router.errors import Internal
from router.model.llama4 import Model
from router.request import GenerationRequest, SamplingParams, TokenDelta
from router.runner import LocalRunner
from router.sampling import sampler
from router.step import StepInput
from tests.local_model import load_model
from tests.reference import make_reference, prompt
from tests.router.engines import drawn, greedy, make_engine, run_to_end, tokens_of

POISON = 77
"""Its embedding is damaged: whatever comes after it in a text is NaN."""

DAMAGE = {"nan": float("nan"), "inf": float("inf")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module", params=DAMAGE)
def damaged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in which one token has a damaged embedding."""
    directory = tmp_path_factory.mktemp("damaged")
    # Wide enough for the fast paths: heads of 32 columns, experts of 64.
    make_reference(directory, "scout", hidden_size=128, head_dim=32, intermediate_size=64, num_local_experts=4)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][POISON] = DAMAGE[request.param]
    save_file(tensors, path, {"format": "pt"})
    return directory


@pytest.fixture(scope="module", params=DTYPES)
def damaged_model(damaged: Path, request: pytest.FixtureRequest) -> Model:
    return load_model(damaged, num_shards=2, dtype=DTYPES[request.param])


def clean(length: int, seed: int) -> tuple[int, ...]:
    return tuple(token_id for token_id in prompt(length, seed=seed) if token_id != POISON)


def good_requests() -> list[GenerationRequest]:
    """No token of theirs may be the damaged one: it is banned."""
    never = {"logit_bias": ((POISON, -100.0),)}
    return [
        greedy("greedy", clean(9, 1), 10, logprobs=2, **never),
        drawn("drawn", clean(21, 2), 10, **never),
        drawn("narrow", clean(40, 3), 10, top_k=20, top_p=0.9, **never),
        greedy("penalised", clean(5, 4), 10, repetition_penalty=1.3, min_tokens=4, **never),
    ]


BAD = {
    "greedy": greedy("bad", (3, POISON, 5)),
    "greedy with logprobs": greedy("bad", (3, POISON, 5), logprobs=3),
    "drawn": drawn("bad", (3, POISON, 5)),
    "top_k": drawn("bad", (3, POISON, 5), top_k=5),
    "top_p": drawn("bad", (3, POISON, 5), top_p=0.5),
    "penalised": drawn("bad", (3, POISON, 5), repetition_penalty=1.5, min_tokens=3),
    "prompt_logprobs": greedy("bad", (3, POISON, 5, 6, 7), prompt_logprobs=1),
    "long": greedy("bad", (*clean(30, 6), POISON, *clean(30, 7))),
}


def serve(engine: Engine, *requests: GenerationRequest) -> list[TokenDelta]:
    for request in requests:
        engine.submit(request)
    return run_to_end(engine)


@pytest.fixture(scope="module")
def undisturbed(damaged_model: Model) -> dict[str, list[int]]:
    deltas = serve(make_engine(damaged_model), *good_requests())
    tokens = {request.request_id: tokens_of(deltas, request.request_id) for request in good_requests()}
    assert {len(made) for made in tokens.values()} == {10}
    return tokens


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_request_whose_logits_are_not_finite_ends_alone_and_says_why(
    damaged_model: Model, undisturbed: dict[str, list[int]], bad: GenerationRequest
) -> None:
    first, *others = good_requests()
    deltas = serve(make_engine(damaged_model), first, bad, *others)
    assert {name: tokens_of(deltas, name) for name in undisturbed} == undisturbed
    [end] = [delta for delta in deltas if delta.request_id == "bad"]
    assert isinstance(end.error, Internal)
    assert "not finite" in str(end.error)


def test_memory_that_held_nan_is_harmless_to_whoever_gets_it_next(
    damaged_model: Model, undisturbed: dict[str, list[int]]
) -> None:
    # Hardly more memory than these requests need, in blocks so long that none fills one: NaN stays behind each.
    engine = make_engine(damaged_model, kv_positions=150, max_block_tokens=64)
    fill = [greedy(f"bad {n}", (POISON, *clean(62, n)), 60) for n in range(4)]
    assert {type(delta.error) for delta in serve(engine, *fill)} == {Internal}
    for request in good_requests():
        assert tokens_of(serve(engine, request), request.request_id) == undisturbed[request.request_id]


@pytest.mark.parametrize("length", [14, 40, 90])
def test_the_prefix_cache_forgets_what_a_bad_request_computed(model: Model, length: int) -> None:
    """Damage of the moment: the same text, later, is computed anew and is right."""
    request = greedy("a", prompt(length, seed=11), 6)
    right = tokens_of(serve(make_engine(model), request), "a")
    engine = make_engine(model)
    sound = model._embedding_VD.clone()
    try:
        model._embedding_VD.fill_(float("nan"))
        assert [type(delta.error) for delta in serve(engine, request)] == [Internal]
    finally:
        model._embedding_VD.copy_(sound)
    assert tokens_of(serve(engine, request), "a") == right
    assert engine.stats.prefix_hit_tokens == 0
    assert engine.stats.kv_bytes_used == 0


def test_what_a_request_had_cached_before_it_went_wrong_is_forgotten_too(model: Model) -> None:
    """Its blocks were published step by step, those of earlier attention chunks are in nobody's hands any more."""
    request = greedy("a", prompt(60, seed=12), 6)
    right = tokens_of(serve(make_engine(model), request), "a")
    engine = make_engine(model, max_step_tokens=16)
    sound = model._embedding_VD.clone()
    try:
        model._embedding_VD.fill_(float("nan"))
        engine.submit(request)
        assert engine.step() == [] == engine.step()  # two pieces of the prompt, both NaN
    finally:
        model._embedding_VD.copy_(sound)
    deltas = run_to_end(engine)  # the rest is sound, but reads the keys and values before it
    assert [type(delta.error) for delta in deltas] == [Internal]
    assert tokens_of(serve(engine, request), "a") == right


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect in the sampler that only rows with min_p meet."""
    whole = sampler.candidates

    def candidates(logits_RV, params, rows):  # type: ignore[no-untyped-def]
        if any(params[row].min_p for row in rows):
            raise IndexError("oh")
        return whole(logits_RV, params, rows)

    monkeypatch.setattr(sampler, "candidates", candidates)


@pytest.mark.usefixtures("breaking")
def test_a_defect_in_sampling_one_request_ends_that_one_only(model: Model) -> None:
    good = [greedy("g", prompt(9)), drawn("d", prompt(12), logprobs=1)]
    right = {request.request_id: tokens_of(serve(make_engine(model), request), request.request_id) for request in good}
    deltas = serve(make_engine(model), good[0], drawn("bad", prompt(8), min_p=0.1), good[1])
    assert {request.request_id: tokens_of(deltas, request.request_id) for request in good} == right
    [end] = [delta for delta in deltas if delta.request_id == "bad"]
    assert isinstance(end.error, Internal)
    assert "IndexError" in str(end.error)


def test_an_id_outside_the_vocabulary_cannot_reach_another_row(model: Model) -> None:
    """Row 0's id V + 3 would be token 3 of row 1. An end token of the config may be such an id."""
    good = greedy("g", prompt(9))
    right = tokens_of(serve(make_engine(model), good), "g")
    engine = make_engine(model)
    engine._eos_token_ids = frozenset({model.config.vocab_size + right[0]})
    deltas = serve(engine, greedy("bad", prompt(8), min_tokens=3), good)
    assert tokens_of(deltas, "g") == right
    assert [type(delta.error) for delta in deltas if delta.request_id == "bad" and delta.is_last] == [Internal]


BREAKING = {
    "no such token": greedy("bad", (3, 100_000, 5)),
    "no such token, logprobs of the prompt": greedy("bad", (3, 5, 100_000), prompt_logprobs=0),
}


@pytest.mark.parametrize("bad", BREAKING.values(), ids=BREAKING)
@pytest.mark.parametrize("later", [False, True], ids=["with the others", "while they run"])
def test_a_request_that_breaks_its_step_ends_alone(model: Model, bad: GenerationRequest, later: bool) -> None:
    good = [greedy("g", prompt(9)), drawn("d", prompt(12), logprobs=1), greedy("p", prompt(7, seed=2))]
    right = {request.request_id: tokens_of(serve(make_engine(model), request), request.request_id) for request in good}
    engine, deltas = make_engine(model), []
    for request in [*good, bad] if later else [good[0], bad, *good[1:]]:
        engine.submit(request)
        deltas += engine.step() if later else []
    deltas += run_to_end(engine)
    assert {request.request_id: tokens_of(deltas, request.request_id) for request in good} == right
    [end] = [delta for delta in deltas if delta.request_id == "bad"]
    assert isinstance(end.error, Internal)  # not Unavailable, which asks for another try
    assert engine.stats.kv_bytes_used == 0


class SmallMachine(LocalRunner):
    """Has memory for 20 tokens of a step."""

    def forward(self, step: StepInput) -> torch.Tensor:
        if len(step.token_ids) > 20:
            raise RuntimeError("out of memory")
        return super().forward(step)


def test_requests_whose_step_is_too_large_are_computed_one_by_one(model: Model) -> None:
    many = [greedy(f"{n}", prompt(8, seed=n), 4) for n in range(5)]
    right = [tokens_of(serve(make_engine(model), request), request.request_id) for request in many]
    deltas = serve(make_engine(model, make_runner=SmallMachine), *many)
    assert [tokens_of(deltas, request.request_id) for request in many] == right


@pytest.mark.parametrize(
    "field", [{"logit_bias": ((2**63, 1.0),)}, {"logit_bias": 5}, {"repetition_penalty": 2.0, "stop_token_ids": None}]
)
def test_a_request_that_cannot_be_queued_leaves_nothing_behind(model: Model, field: dict[str, object]) -> None:
    engine = make_engine(model)
    with pytest.raises((AttributeError, OverflowError, TypeError)):
        engine.submit(greedy("a", prompt(5), **{"min_tokens": 1, **field}))
    assert not engine.has_work
    assert len(tokens_of(serve(engine, greedy("a", prompt(5))), "a")) == 12


extremes = st.sampled_from([1e-45, 1e-38, 1e-6, 0.5, 1.0, 2.0, 1e6, 1e38])


@settings(max_examples=40, deadline=None)
@given(
    st.builds(
        SamplingParams,
        max_tokens=st.just(4),
        temperature=st.sampled_from([0.0, 1e-45, 1e-38, 1.0, 100.0, 1e38]),
        top_k=st.sampled_from([0, 1, 128, 2**31 - 1]),
        top_p=st.sampled_from([1e-45, 1e-6, 0.5, 1.0]),
        min_p=st.sampled_from([0.0, 1e-45, 0.5, 1.0]),
        repetition_penalty=extremes,
        presence_penalty=st.sampled_from([-1e308, -2.0, 0.0, 2.0, 1e308]),
        frequency_penalty=st.sampled_from([-1e308, -2.0, 0.0, 2.0, 1e308]),
        logit_bias=st.sampled_from([(), ((5, 1e308),), ((5, -1e308), (6, 100.0))]),
        logprobs=st.sampled_from([None, 0, 5]),
        min_tokens=st.sampled_from([0, 4]),
        seed=st.just(1),
    )
)
def test_no_parameters_hurt_whoever_else_is_in_the_batch(model: Model, params: SamplingParams) -> None:
    good = [greedy("g", prompt(9), 4), drawn("d", prompt(12), 4, top_p=0.9)]
    right = {request.request_id: tokens_of(serve(make_engine(model), request), request.request_id) for request in good}
    deltas = serve(make_engine(model), good[0], GenerationRequest("odd", prompt(8), params), good[1])
    assert {request.request_id: tokens_of(deltas, request.request_id) for request in good} == right
    for delta in deltas:
        assert delta.error is None
        json.dumps([[entry.logprob, *entry.top] for entry in delta.logprobs], allow_nan=False)

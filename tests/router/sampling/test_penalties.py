"""Biases, penalties and min_tokens change the logits as transformers' processors do, each row by its own past."""

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from router.request import SamplingParams
from router.sampling.penalties import penalised
from router.sampling.sampler import sample
from tests.router.sampling.states import state, states
from tests.router.sampling.test_candidates import random_logits

VOCAB, EOS = 40, (38, 39)
LEAST = torch.finfo(torch.float32).min


def theirs(logits_V: torch.Tensor, p: SamplingParams, prompt: Sequence[int], made: Sequence[int]) -> torch.Tensor:
    """transformers' processors in transformers' order; the penalties that it lacks in between, word for word."""
    input_ids = torch.tensor([[*prompt, *made]])
    scores_1V = logits_V[None].clone()
    if p.logit_bias:
        scores_1V = SequenceBiasLogitsProcessor([[[token_id], bias] for token_id, bias in p.logit_bias])(
            input_ids, scores_1V
        )
    if p.repetition_penalty != 1:
        scores_1V = RepetitionPenaltyLogitsProcessor(p.repetition_penalty)(input_ids, scores_1V)
    for token_id, count in Counter(made).items():
        scores_1V[0, token_id] -= p.frequency_penalty * count + p.presence_penalty
    if p.min_tokens:
        ending = [*p.stop_token_ids, *(() if p.ignore_eos else EOS)]
        if ending:
            scores_1V = MinNewTokensLengthLogitsProcessor(len(prompt), p.min_tokens, ending)(input_ids, scores_1V)
    return scores_1V[0]


tokens = st.integers(0, VOCAB - 1)
penalties = st.sampled_from([-2.0, -0.3, 0.0, 0.0, 0.7, 2.0])
any_params = st.builds(
    SamplingParams,
    max_tokens=st.just(20),
    stop_token_ids=st.frozensets(tokens, max_size=3),
    presence_penalty=penalties,
    frequency_penalty=penalties,
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.2, 30.0]),
    logit_bias=st.dictionaries(tokens, st.floats(-100, 100, width=32), max_size=4).map(lambda d: tuple(d.items())),
    min_tokens=st.integers(0, 8),
    ignore_eos=st.booleans(),
)
texts = st.lists(tokens, min_size=1, max_size=12), st.lists(tokens, max_size=12)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(any_params, *texts), min_size=1, max_size=6))
def test_every_row_of_a_batch_is_changed_as_by_transformers(
    rows: list[tuple[SamplingParams, list[int], list[int]]],
) -> None:
    logits_RV = random_logits(len(rows), 3.0, VOCAB)
    before = logits_RV.clone()
    ours_RV = penalised(logits_RV, [state(p, prompt, made, EOS) for p, prompt, made in rows])
    theirs_RV = torch.stack([theirs(logits_RV[row], *of_row) for row, of_row in enumerate(rows)])
    torch.testing.assert_close(ours_RV, theirs_RV.clamp(min=LEAST), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits_RV, before)  # their log-probabilities are still wanted


def test_rows_without_wishes_cost_nothing() -> None:
    logits_RV = random_logits(3)
    plain = [SamplingParams(9), SamplingParams(9, 0.0), SamplingParams(9, min_tokens=1, ignore_eos=True)]
    assert penalised(logits_RV, states(plain)) is logits_RV


def greedy_token(logits_V: torch.Tensor, prompt: Sequence[int] = (), made: Sequence[int] = (), **params: object) -> int:
    p = SamplingParams(100, 0.0, **params)  # type: ignore[arg-type]
    return sample(logits_V[None], [state(p, prompt, made, EOS)], [len(prompt) + len(made)])[0].token_id


def test_a_bias_of_100_forces_a_token_and_minus_100_bans_it() -> None:
    logits_V = random_logits(1, 3.0, VOCAB)[0]
    best, second = logits_V.topk(2).indices.tolist()
    worst = int(logits_V.argmin())
    assert greedy_token(logits_V, logit_bias=((worst, 100.0),)) == worst
    assert greedy_token(logits_V, logit_bias=((best, -100.0),)) == second
    drawn = [
        sample(logits_V[None], states([SamplingParams(1, 1.0, seed=seed, logit_bias=((best, -100.0),))]), [0])
        for seed in range(200)
    ]
    assert best not in {token.token_id for [token] in drawn}


def test_repetition_counts_prompt_and_completion_presence_and_frequency_the_completion_only() -> None:
    logits_V = torch.zeros(VOCAB)
    logits_V[1], logits_V[2] = 3.0, 2.0
    assert greedy_token(logits_V, prompt=[1], repetition_penalty=2.0) == 2
    assert greedy_token(logits_V, made=[1], repetition_penalty=2.0) == 2
    assert greedy_token(logits_V, prompt=[1], presence_penalty=2.0, frequency_penalty=2.0) == 1
    assert greedy_token(logits_V, made=[1], presence_penalty=1.5) == 2
    assert greedy_token(logits_V, made=[1], frequency_penalty=0.6) == 1
    assert greedy_token(logits_V, made=[1, 1], frequency_penalty=0.6) == 2


def test_nothing_ends_the_text_before_min_tokens() -> None:
    logits_V = torch.zeros(VOCAB)
    logits_V[EOS[0]], logits_V[5], logits_V[6] = 9.0, 8.0, 7.0
    stop = frozenset({5})
    assert greedy_token(logits_V, made=[1], min_tokens=2, stop_token_ids=stop) == 6
    assert greedy_token(logits_V, made=[1, 1], min_tokens=2, stop_token_ids=stop) == EOS[0]
    # What does not end the text may come.
    assert greedy_token(logits_V, made=[1], min_tokens=2, ignore_eos=True) == EOS[0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("penalty", [1e-300, 1e-40, 1e38, 1e300])
def test_extreme_penalties_give_tokens_not_nan(penalty: float, temperature: float) -> None:
    logits_RV = random_logits(4, 50.0, VOCAB)
    p = SamplingParams(9, temperature, repetition_penalty=penalty)
    everything = [state(p, range(VOCAB)) for _ in range(4)]
    penalised_RV = penalised(logits_RV, everything)
    assert torch.isfinite(penalised_RV).all()
    for row, token in enumerate(sample(logits_RV, everything, [VOCAB] * 4)):
        # The signs are left: what was below zero is out of the question, or nothing else is.
        assert logits_RV[row, token.token_id] > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_every_token_would_end_the_text_one_is_made_all_the_same(temperature: float) -> None:
    p = SamplingParams(9, temperature, stop_token_ids=frozenset(range(VOCAB)), min_tokens=3)
    [token] = sample(random_logits(1, 3.0, VOCAB), [state(p, [1])], [1])
    assert 0 <= token.token_id < VOCAB


def test_a_long_past_is_kept_once_per_token() -> None:
    """A step must not cost more because a text is long."""
    p = SamplingParams(100_000, repetition_penalty=1.1, frequency_penalty=0.1)
    past = state(p, list(range(10)) * 1000, [3, 4] * 5000)
    assert (sorted(past.seen_ids), sorted(past.made_ids), list(past.made_counts)) == (
        list(range(10)), [3, 4], [5000.0, 5000.0],
    )  # fmt: skip


def test_what_no_parameter_needs_is_not_kept() -> None:
    past = state(SamplingParams(100), [1, 2, 3], [4, 5], EOS)
    assert not any((past.seen_ids, past.made_ids, past.made_counts, past.ending_ids, past.bias_ids))

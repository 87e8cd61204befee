"""Which tokens may be drawn and how likely: as transformers' logits processors have it."""

from collections.abc import Sequence
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from router.request import SamplingParams
from router.sampling.candidates import candidates

VOCAB = 61
TEMPERATURES = (1e-6, 0.1, 0.7, 1.0, 1.5, 100.0)
TOP_KS = (0, 1, 2, 7, VOCAB, 10 * VOCAB)
TOP_PS = (1e-6, 0.1, 0.5, 0.9, 0.999, 1.0)
MIN_PS = (0.0, 0.2, 1.0)
ALL_COMBINATIONS = [
    SamplingParams(1, temperature, top_p, top_k, min_p=min_p)
    for temperature, top_k, top_p, min_p in product(TEMPERATURES, TOP_KS, TOP_PS, MIN_PS)
]


def random_logits(rows: int, spread: float = 1.0, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def our_probabilities(logits_RV: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """In the order of the vocabulary."""
    result_RV = torch.full(logits_RV.shape, torch.nan, dtype=torch.float64)
    for found in candidates(logits_RV, params, list(range(len(params)))):
        weight_RN = found.weight_RN.double()
        row_RV = torch.zeros(len(found.rows), logits_RV.shape[-1], dtype=torch.float64)
        ids_RN = torch.arange(logits_RV.shape[-1]).expand_as(row_RV) if found.token_id_RN is None else found.token_id_RN
        result_RV[found.rows] = row_RV.scatter(1, ids_RN, weight_RN / weight_RN.sum(-1, keepdim=True))
    return result_RV


def transformers_probabilities(logits_RV: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """In float64: in float32 a logit over a small temperature has few digits behind the point."""
    no_input_ids = torch.empty(1, 0, dtype=torch.int64)
    rows = []
    for logits_V, p in zip(logits_RV.double(), params, strict=True):
        scores_1V = TemperatureLogitsWarper(p.temperature)(no_input_ids, logits_V[None])
        if p.top_k:
            scores_1V = TopKLogitsWarper(p.top_k)(no_input_ids, scores_1V)
        if p.top_p < 1:
            scores_1V = TopPLogitsWarper(p.top_p)(no_input_ids, scores_1V)
        if p.min_p:
            scores_1V = MinPLogitsWarper(p.min_p)(no_input_ids, scores_1V)
        rows.append(torch.softmax(scores_1V, dim=-1)[0])
    return torch.stack(rows)


@pytest.fixture(scope="module", params=[0.3, 1.0, 8.0], ids="logits spread by {}".format)
def both(request: pytest.FixtureRequest) -> tuple[torch.Tensor, torch.Tensor]:
    """All combinations of parameters in one batch: (our probabilities, transformers' probabilities)."""
    logits_RV = random_logits(len(ALL_COMBINATIONS), request.param)
    return our_probabilities(logits_RV, ALL_COMBINATIONS), transformers_probabilities(logits_RV, ALL_COMBINATIONS)


def test_the_same_tokens_are_kept_as_by_transformers(both: tuple[torch.Tensor, torch.Tensor]) -> None:
    # float32 has no smaller probability than 1e-45; what is less likely counts as left out.
    ours, theirs = both[0] > 1e-40, both[1] > 1e-40
    wrong_rows = (ours != theirs).any(dim=-1).nonzero().flatten().tolist()
    assert [ALL_COMBINATIONS[row] for row in wrong_rows] == []


def test_the_probabilities_are_those_of_transformers(both: tuple[torch.Tensor, torch.Tensor]) -> None:
    ours, theirs = both
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


# Flat ones have their candidates spread over thousands of tokens, more than are looked at first.
@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0])
@pytest.mark.parametrize("vocab", [32_000, 202_048])
def test_over_a_vocabulary_of_real_size_rounding_moves_next_to_nothing(spread: float, vocab: int) -> None:
    params = [
        *(SamplingParams(1, 1.0, top_p) for top_p in (0.001, 0.02, 0.5, 0.95, 0.9999)),
        *(SamplingParams(1, 1.0, top_k=top_k) for top_k in (127, 128, 129, 2047, 2048, 20_000)),
        *(SamplingParams(1, 1.0, 0.9, top_k, 0, min_p=min_p) for top_k in (0, 50, 3000) for min_p in (0.0, 0.05)),
        SamplingParams(1, 1.0, min_p=0.05),
        SamplingParams(1, 0.8),
    ]
    logits_RV = random_logits(len(params), spread, vocab)
    moved_RV = (our_probabilities(logits_RV, params) - transformers_probabilities(logits_RV, params)).abs()
    assert float(moved_RV.sum(dim=-1).max()) < 1e-4


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.integers(-8, 8), min_size=2, max_size=300),
    temperature=st.floats(0.05, 50),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 310),
    min_p=st.floats(0, 1),
)
def test_few_different_logits_are_cut_as_by_sorting_them_all(
    logits: list[int], temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    """Many equal logits, as bfloat16 gives them: what lies at a border must not depend on how it was found."""
    few_V = torch.tensor(logits, dtype=torch.float32) / 4
    params = SamplingParams(1, temperature, top_p, top_k, min_p=min_p)
    ours_V = our_probabilities(few_V[None], [params])[0]

    order = sorted(range(len(logits)), key=lambda token_id: (-logits[token_id], token_id))
    weights = [2.718281828459045 ** ((logits[t] - max(logits)) / 4 / max(temperature, 1e-6)) for t in order]
    if top_k:
        order, weights = order[:top_k], weights[:top_k]
    total, before, kept = sum(weights), 0.0, {}
    for token_id, weight in zip(order, weights, strict=True):
        if abs(before / total - top_p) < 1e-5 or abs(weight - min_p) < 1e-5 * min_p:
            return  # on the border: rounding decides
        if (top_p == 1 or before < top_p * total) and weight >= min_p:
            kept[token_id] = weight
        before += weight
    kept = {token_id: weight for token_id, weight in kept.items() if weight > 1e-40}
    assert sorted(kept) == (ours_V > 1e-40).nonzero().flatten().tolist()
    for token_id, weight in kept.items():
        assert float(ours_V[token_id]) == pytest.approx(weight / sum(kept.values()), abs=1e-6)


@pytest.mark.parametrize("eighths", range(1, 8))
def test_top_p_reached_exactly_ends_the_set_as_in_transformers(eighths: int) -> None:
    """Eight tokens of 1/8, all sums exact: top_p of n/8 keeps n tokens, anything above keeps one more."""
    even = torch.zeros(1, 8)
    kept = []
    for top_p in (eighths / 8, eighths / 8 + 1e-6):
        params = [SamplingParams(1, top_p=top_p)]
        kept.append([int((f(even, params) > 0).sum()) for f in (our_probabilities, transformers_probabilities)])
    assert kept == [[eighths, eighths], [eighths + 1, eighths + 1]]


def test_equal_logits_at_the_border_of_top_k_are_kept_by_lowest_token_id() -> None:
    """transformers would keep all four; we keep exactly k, so that top_k 1 is greedy."""
    probability_V = our_probabilities(torch.tensor([[0.0, 3.0, 1.0, 1.0, 1.0, 1.0]]), [SamplingParams(1, top_k=3)])[0]
    assert probability_V.nonzero().flatten().tolist() == [1, 2, 3]


@pytest.mark.parametrize("vocab", [200, 5000])
@pytest.mark.parametrize("top_k", [1, 64, 127, 128, 150])
def test_of_a_vocabulary_of_equals_the_lowest_token_ids_are_kept(vocab: int, top_k: int) -> None:
    probability_V = our_probabilities(torch.zeros(1, vocab), [SamplingParams(1, top_k=top_k)])[0]
    assert probability_V.nonzero().flatten().tolist() == list(range(top_k))


@pytest.mark.parametrize("smallest", [1e-30, 1e-45, 1e-300])
@pytest.mark.parametrize("name", ["temperature", "top_p"])
def test_parameters_too_small_for_float32_leave_the_most_likely_token(name: str, smallest: float) -> None:
    logits_RV = random_logits(4, spread=50.0)
    params = [SamplingParams(1, **{"temperature": 1.0, "top_p": 1.0, name: smallest})] * 4  # type: ignore[arg-type]
    expected = torch.nn.functional.one_hot(logits_RV.argmax(dim=-1), VOCAB)
    assert torch.equal(our_probabilities(logits_RV, params), expected.double())


def test_each_row_is_answered_once_by_what_it_asked_for() -> None:
    params = [
        SamplingParams(1, top_k=k, top_p=p, min_p=m) for k, p, m in product((0, 3, 200, 4000), (0.5, 1.0), (0.0, 0.1))
    ]
    logits_RV = torch.cat([random_logits(len(params), spread, 4500) for spread in (0.01, 5.0)])
    rows = [row for row in range(2 * len(params)) if row % 3]  # as if the others were greedy
    answered = [row for found in candidates(logits_RV, params * 2, rows) for row in found.rows]
    assert sorted(answered) == rows

"""Which tokens may be drawn and how likely: as transformers' logits processors have it. And the noise: reproducible."""

from collections.abc import Callable, Sequence
from itertools import product

import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from router.request import SamplingParams
from router.sampler import candidate_probabilities, sample, uniform

VOCAB = 61
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)
TEMPERATURES = (1e-6, 0.1, 0.7, 1.0, 1.5, 100.0)
TOP_KS = (0, 1, 2, 7, VOCAB, 10 * VOCAB)
TOP_PS = (1e-6, 0.1, 0.5, 0.9, 0.999, 1.0)
ALL_COMBINATIONS = [
    SamplingParams(1, temperature, top_p, top_k) for temperature, top_k, top_p in product(TEMPERATURES, TOP_KS, TOP_PS)
]


def random_logits(rows: int, spread: float = 1.0, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def in_vocabulary_order(probability_RV: torch.Tensor, token_id_RV: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(probability_RV).scatter(1, token_id_RV, probability_RV)


def our_probabilities(logits_RV: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    return in_vocabulary_order(*candidate_probabilities(logits_RV, params))


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
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-6)


def test_over_a_vocabulary_of_real_size_rounding_moves_next_to_nothing() -> None:
    params = [SamplingParams(1, 1.0, top_p) for top_p in (0.5, 0.95, 0.9999)]
    logits_RV = random_logits(len(params), spread=3.0, vocab=202_048)
    moved_RV = (our_probabilities(logits_RV, params) - transformers_probabilities(logits_RV, params)).abs()
    assert float(moved_RV.sum(dim=-1).max()) < 1e-4


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


@pytest.mark.parametrize("smallest", [1e-30, 1e-45, 1e-300])
@pytest.mark.parametrize("name", ["temperature", "top_p"])
def test_parameters_too_small_for_float32_leave_the_most_likely_token(name: str, smallest: float) -> None:
    logits_RV = random_logits(4, spread=50.0)
    params = [SamplingParams(1, **{"temperature": 1.0, "top_p": 1.0, name: smallest})] * 4  # type: ignore[arg-type]
    expected = torch.nn.functional.one_hot(logits_RV.argmax(dim=-1), VOCAB)
    assert torch.equal(our_probabilities(logits_RV, params), expected.float())


def test_temperature_zero_takes_the_most_likely_token_whatever_the_seed() -> None:
    logits_RV = random_logits(50)
    params = [SamplingParams(1, temperature=0.0, top_p=0.5, top_k=3, seed=seed) for seed in range(50)]
    chosen = [token.token_id for token in sample(logits_RV, params, range(50))]
    assert chosen == logits_RV.argmax(dim=-1).tolist()


def test_greedy_and_drawn_rows_in_one_batch_keep_to_themselves() -> None:
    logits_RV = random_logits(6)
    drawn = SamplingParams(1, temperature=2.0, seed=5)
    mixed = [GREEDY, drawn, GREEDY, GREEDY, drawn, drawn]
    together = [token.token_id for token in sample(logits_RV, mixed, range(6))]
    alone = [sample(logits_RV[row : row + 1], [mixed[row]], [row])[0].token_id for row in range(6)]
    assert together == alone


def test_a_draw_depends_on_seed_and_position_not_on_batch_mates_or_row() -> None:
    rows = 40
    logits_RV = random_logits(rows, spread=0.5)
    params = [SamplingParams(1, temperature=1 + row / rows, top_k=row, seed=row * 7919) for row in range(rows)]
    positions = [row * row for row in range(rows)]
    in_order = [token.token_id for token in sample(logits_RV, params, positions)]
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = sample(logits_RV[order], [params[row] for row in order], [positions[row] for row in order])
    assert [token.token_id for token in shuffled] == [in_order[row] for row in order]


# The 0.9999 quantile of the chi-square distribution with 7 degrees of freedom.
CHI_SQUARE_7 = 29.88


@pytest.mark.parametrize(
    "places",
    [lambda n: (12345, n), lambda n: (n, 17), lambda n: (n * 2**32, 2**20 - n)],
    ids=["over positions", "over seeds", "over both"],
)
@pytest.mark.parametrize("params", [SamplingParams(1), SamplingParams(1, temperature=2.5)], ids=["T=1", "T=2.5"])
def test_draws_are_distributed_as_the_probabilities_say(
    places: Callable[[int], tuple[int, int]], params: SamplingParams
) -> None:
    draws = 4000
    logits_1V = random_logits(1, vocab=8)
    seeds, positions = zip(*map(places, range(draws)), strict=True)
    rows = [SamplingParams(1, params.temperature, seed=seed) for seed in seeds]
    tokens = [token.token_id for token in sample(logits_1V.expand(draws, -1), rows, positions)]
    expected = our_probabilities(logits_1V, [params])[0] * draws
    observed = torch.tensor(tokens).bincount(minlength=8)
    assert float(((observed - expected) ** 2 / expected).sum()) < CHI_SQUARE_7


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    draws = 4000
    logits_1V = random_logits(1, vocab=8)
    params = SamplingParams(1, temperature=100.0, top_k=3)  # three tokens, almost equally likely
    drawn = sample(logits_1V.expand(draws, -1), [params] * draws, range(draws))
    assert {token.token_id for token in drawn} == set(logits_1V[0].topk(3).indices.tolist())


UNIFORMS = {  # computed apart from our code, with numpy's wrapping 64-bit integers
    (0, 0): "0x1.4e0dba5e9a32fp-1",
    (0, 1): "0x1.f647530ffa1bcp-2",
    (1, 0): "0x1.7906ac21d0e58p-2",
    (1234567, 8191): "0x1.14aa7d22a7a3dp-1",
    (2**64 - 1, 2**63): "0x1.efe28a9cd5143p-1",
}


@pytest.mark.parametrize("place", UNIFORMS)
def test_uniform_never_changes(place: tuple[int, int]) -> None:
    """Routers of different versions must draw the same noise, or a stream changes when it moves."""
    assert uniform(*place).hex() == UNIFORMS[place]


def test_uniform_differs_wherever_seed_or_position_differs() -> None:
    seeds = [0, 1, 2, 2**32, 2**63, 2**64 - 1]
    positions = [0, 1, 2, 2**20, 2**23]
    assert len({uniform(seed, position) for seed, position in product(seeds, positions)}) == 30


# splitmix64's finalizer, to find seeds for extreme draws: uniform(seed, 0) is finalize(finalize(seed)).


def unfinalize(value: int) -> int:
    def unshift(value: int, shift: int) -> int:
        original = value
        for _ in range(64 // shift):
            original = value ^ (original >> shift)
        return original

    value = unshift(value, 31) * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
    value = unshift(value, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64
    return (unshift(value, 30) - 0x9E3779B97F4A7C15) % 2**64


SEED_OF_THE_LEAST = unfinalize(unfinalize(0))
SEED_OF_THE_GREATEST = unfinalize(unfinalize(2**64 - 1))


def test_uniform_reaches_zero_but_never_one() -> None:
    assert uniform(SEED_OF_THE_LEAST, 0) == 0.0
    assert uniform(SEED_OF_THE_GREATEST, 0) == 1.0 - 2**-53


def test_a_draw_on_the_border_between_two_tokens_takes_the_second() -> None:
    half = SamplingParams(1, seed=unfinalize(unfinalize(2**63)))
    assert uniform(half.seed, 0) == 0.5
    assert sample(torch.zeros(1, 2), [half], [0])[0].token_id == 1


def test_extreme_draws_take_the_most_and_the_least_likely_token_that_is_left() -> None:
    rows = 200
    logits_RV = random_logits(rows)
    order_RV = logits_RV.sort(dim=-1, descending=True).indices
    top_ks = [1 + row % VOCAB for row in range(rows)]
    for seed, expected in (
        (SEED_OF_THE_LEAST, [int(order_RV[row, 0]) for row in range(rows)]),
        (SEED_OF_THE_GREATEST, [int(order_RV[row, top_k - 1]) for row, top_k in enumerate(top_ks)]),
    ):
        params = [SamplingParams(1, temperature=1.5, top_k=top_k, seed=seed) for top_k in top_ks]
        assert [token.token_id for token in sample(logits_RV, params, [0] * rows)] == expected


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_logprobs_are_those_of_the_models_own_distribution(temperature: float) -> None:
    """Before temperature, top_k and top_p: what the model thinks, not what was left to draw from."""
    logits_RV = random_logits(5)
    params = [SamplingParams(1, temperature, top_k=2, seed=row, logprobs=4) for row in range(5)]
    expected_RV = torch.log_softmax(logits_RV, dim=-1)
    for row, token in enumerate(sample(logits_RV, params, range(5))):
        assert token.logprobs is not None
        assert token.logprobs.token_id == token.token_id
        assert token.logprobs.logprob == pytest.approx(float(expected_RV[row, token.token_id]), abs=1e-6)


def test_the_most_likely_tokens_are_listed_in_order_with_their_logprobs() -> None:
    logits_RV = random_logits(3)
    for row, token in enumerate(sample(logits_RV, [SamplingParams(1, logprobs=5)] * 3, range(3))):
        assert token.logprobs is not None
        values, token_ids = torch.log_softmax(logits_RV[row], dim=-1).topk(5)
        assert [token_id for token_id, _ in token.logprobs.top] == token_ids.tolist()
        assert [logprob for _, logprob in token.logprobs.top] == pytest.approx(values.tolist(), abs=1e-6)


def test_each_row_gets_the_number_of_logprobs_that_it_asked_for() -> None:
    asked = [None, 0, 3, 20, None, 100]
    params = [SamplingParams(1, logprobs=count) for count in asked]
    sampled = sample(random_logits(6), params, range(6))
    got = [None if token.logprobs is None else len(token.logprobs.top) for token in sampled]
    assert got == [None, 0, 3, 20, None, VOCAB]


def test_logprobs_do_not_change_what_is_drawn() -> None:
    logits_RV = random_logits(20)
    without = sample(logits_RV, [SamplingParams(1, seed=9)] * 20, range(20))
    with_logprobs = sample(logits_RV, [SamplingParams(1, seed=9, logprobs=2)] * 20, range(20))
    assert [token.token_id for token in with_logprobs] == [token.token_id for token in without]


def test_of_equally_likely_tokens_the_chosen_one_comes_first_among_the_alternatives() -> None:
    logits_RV = torch.zeros(1, 50)
    (token,) = sample(logits_RV, [SamplingParams(max_tokens=1, temperature=0, logprobs=3)], [0])
    assert token.logprobs is not None
    assert token.logprobs.top[0][0] == token.token_id
    assert len({token_id for token_id, _ in token.logprobs.top}) == 3

"""The draws: distributed as they should be, reproducible, and each row's own. And the log-probabilities."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch

from router.request import SamplingParams
from router.sampling.logprobs import token_logprobs
from router.sampling.noise import derived_seed, uniform
from router.sampling.sampler import sample
from router.sampling.state import SamplingState
from tests.router.sampling.states import state, states
from tests.router.sampling.test_candidates import VOCAB, our_probabilities, random_logits

GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


def test_temperature_zero_takes_the_most_likely_token_whatever_the_seed() -> None:
    logits_RV = random_logits(50)
    params = [SamplingParams(1, temperature=0.0, top_p=0.5, top_k=3, seed=seed) for seed in range(50)]
    chosen = [token.token_id for token in sample(logits_RV, states(params), range(50))]
    assert chosen == logits_RV.argmax(dim=-1).tolist()


def test_greedy_and_drawn_rows_in_one_batch_keep_to_themselves() -> None:
    logits_RV = random_logits(6)
    drawn = SamplingParams(1, temperature=2.0, seed=5)
    mixed = [GREEDY, drawn, GREEDY, GREEDY, drawn, drawn]
    together = [token.token_id for token in sample(logits_RV, states(mixed), range(6))]
    alone = [sample(logits_RV[row : row + 1], states([mixed[row]]), [row])[0].token_id for row in range(6)]
    assert together == alone


def test_a_draw_depends_on_seed_and_position_not_on_batch_mates_or_row() -> None:
    rows = 40
    logits_RV = random_logits(rows, spread=0.5)
    params = [SamplingParams(1, temperature=1 + row / rows, top_k=row, seed=row * 7919) for row in range(rows)]
    positions = [row * row for row in range(rows)]
    in_order = [token.token_id for token in sample(logits_RV, states(params), positions)]
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = sample(logits_RV[order], states([params[row] for row in order]), [positions[row] for row in order])
    assert [token.token_id for token in shuffled] == [in_order[row] for row in order]


def a_bit_of_everything(rows: int) -> list[SamplingParams]:
    """Rows of which no two ask for the same."""
    temperatures, top_ks, top_ps, min_ps = (0.0, 0.3, 1.0, 5.0), (0, 0, 40, 500), (1.0, 0.9, 0.999), (0.0, 0.0, 0.02)
    return [
        SamplingParams(
            100,
            temperatures[row % 4],
            top_ps[row % 3],
            top_ks[row // 4 % 4],
            seed=row * 7919,
            stop_token_ids=frozenset({row}),
            logprobs=(None, 0, 5)[row % 3],
            min_p=min_ps[row // 2 % 3],
            presence_penalty=(0.0, 1.5)[row // 5 % 2],
            frequency_penalty=(0.0, 0.0, -0.7)[row // 3 % 3],
            repetition_penalty=(1.0, 1.3)[row // 6 % 2],
            logit_bias=(((row, 3.0), (7, -100.0)), ())[row // 7 % 2],
            min_tokens=(0, 50)[row // 8 % 2],
        )
        for row in range(rows)
    ]


@pytest.mark.parametrize("vocab", [1000, 32_000])
@pytest.mark.parametrize("spread", [0.2, 4.0])
def test_a_row_gets_in_a_mixed_batch_of_64_what_it_gets_alone(vocab: int, spread: float) -> None:
    rows, steps = 64, 4
    logits_SRV = random_logits(rows * steps, spread, vocab).unflatten(0, (steps, rows))
    prompts = [[(row * 31 + place) % vocab for place in range(row)] for row in range(rows)]

    def make(row: int) -> SamplingState:
        return state(params[row], prompts[row], eos=[5])

    params = a_bit_of_everything(rows)
    together, alone = [make(row) for row in range(rows)], [make(row) for row in range(rows)]
    for step in range(steps):
        positions = [len(prompts[row]) + step for row in range(rows)]
        batch = sample(logits_SRV[step], together, positions)
        single = [sample(logits_SRV[step, row][None], [alone[row]], [positions[row]])[0] for row in range(rows)]
        assert [token.token_id for token in batch] == [token.token_id for token in single]
        for ours, theirs in zip(batch, single, strict=True):
            assert (ours.logprobs is None) == (theirs.logprobs is None)
            if ours.logprobs is not None and theirs.logprobs is not None:
                assert ours.logprobs.logprob == pytest.approx(theirs.logprobs.logprob, abs=1e-5)
        for row, token in enumerate(batch):
            together[row].append(token.token_id)
            alone[row].append(token.token_id)


# The 0.9999 quantile of the chi-square distribution with 7 degrees of freedom.
CHI_SQUARE_7 = 29.88


@pytest.mark.parametrize(
    "places",
    [lambda n: (12345, n), lambda n: (n, 17), lambda n: (n * 2**32, 2**20 - n)],
    ids=["over positions", "over seeds", "over both"],
)
@pytest.mark.parametrize(
    "params",
    [SamplingParams(1), SamplingParams(1, temperature=2.5), SamplingParams(1, top_p=0.999999)],
    ids=["T=1", "T=2.5", "top_p"],
)
def test_draws_are_distributed_as_the_probabilities_say(
    places: Callable[[int], tuple[int, int]], params: SamplingParams
) -> None:
    draws = 4000
    logits_1V = random_logits(1, vocab=8)
    seeds, positions = zip(*map(places, range(draws)), strict=True)
    rows = [replace(params, seed=seed) for seed in seeds]
    tokens = [token.token_id for token in sample(logits_1V.expand(draws, -1), states(rows), positions)]
    expected = our_probabilities(logits_1V, [params])[0] * draws
    observed = torch.tensor(tokens).bincount(minlength=8)
    assert float(((observed - expected) ** 2 / expected).sum()) < CHI_SQUARE_7


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    draws = 4000
    logits_1V = random_logits(1, vocab=8)
    params = SamplingParams(1, temperature=100.0, top_k=3)  # three tokens, almost equally likely
    drawn = sample(logits_1V.expand(draws, -1), states([params] * draws), range(draws))
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


def test_derived_seeds_are_seeds_and_differ_between_seeds_and_indices() -> None:
    seeds = {derived_seed(seed, index) for seed in (0, 1, 2, 3, 2**63, 2**64 - 1) for index in range(16)}
    assert len(seeds) == 6 * 16
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert derived_seed(1234, 0) == 1234
    assert derived_seed(1234, 1) == 0xB2B8EC3A6254E62C  # computed apart from our code; it must never change


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
    assert sample(torch.zeros(1, 2), states([half]), [0])[0].token_id == 1


def test_extreme_draws_take_the_most_and_the_least_likely_token_that_is_left() -> None:
    rows = 200
    logits_RV = random_logits(rows, vocab=150)
    order_RV = logits_RV.sort(dim=-1, descending=True).indices
    top_ks = [1 + row % 100 for row in range(rows)]
    for seed, expected in (
        (SEED_OF_THE_LEAST, [int(order_RV[row, 0]) for row in range(rows)]),
        (SEED_OF_THE_GREATEST, [int(order_RV[row, top_k - 1]) for row, top_k in enumerate(top_ks)]),
    ):
        params = [SamplingParams(1, temperature=1.5, top_k=top_k, seed=seed) for top_k in top_ks]
        assert [token.token_id for token in sample(logits_RV, states(params), [0] * rows)] == expected


def test_extreme_draws_without_an_order_take_the_first_and_the_last_token_that_is_left() -> None:
    """Rows without top_k and top_p draw in the order of the vocabulary; min_p leaves the two likeliest here."""
    logits_RV = random_logits(100, 3.0, 32_000)
    for seed, place in ((SEED_OF_THE_LEAST, 0), (SEED_OF_THE_GREATEST, 1)):
        top_R2 = logits_RV.topk(3)
        ratio = ((top_R2.values[:, 1:] - top_R2.values[:, :1]).exp()).mean(-1)  # between the second's and the third's
        params = [SamplingParams(1, min_p=float(min_p), seed=seed) for min_p in ratio]
        expected = top_R2.indices[:, :2].sort().values[:, place].tolist()
        assert [token.token_id for token in sample(logits_RV, states(params), [0] * 100)] == expected


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_logprobs_are_those_of_the_models_own_distribution(temperature: float) -> None:
    """Before temperature, top_k and top_p: what the model thinks, not what was left to draw from."""
    logits_RV = random_logits(5)
    params = [SamplingParams(1, temperature, top_k=2, seed=row, logprobs=4) for row in range(5)]
    expected_RV = torch.log_softmax(logits_RV, dim=-1)
    for row, token in enumerate(sample(logits_RV, states(params), range(5))):
        assert token.logprobs is not None
        assert token.logprobs.token_id == token.token_id
        assert token.logprobs.logprob == pytest.approx(float(expected_RV[row, token.token_id]), abs=1e-6)


def test_the_most_likely_tokens_are_listed_in_order_with_their_logprobs() -> None:
    logits_RV = random_logits(3)
    for row, token in enumerate(sample(logits_RV, states([SamplingParams(1, logprobs=5)] * 3), range(3))):
        assert token.logprobs is not None
        values, token_ids = torch.log_softmax(logits_RV[row], dim=-1).topk(5)
        assert [token_id for token_id, _ in token.logprobs.top] == token_ids.tolist()
        assert [logprob for _, logprob in token.logprobs.top] == pytest.approx(values.tolist(), abs=1e-6)


def test_each_row_gets_the_number_of_logprobs_that_it_asked_for() -> None:
    asked = [None, 0, 3, 20, None, 100]
    params = [SamplingParams(1, logprobs=count) for count in asked]
    sampled = sample(random_logits(6), states(params), range(6))
    got = [None if token.logprobs is None else len(token.logprobs.top) for token in sampled]
    assert got == [None, 0, 3, 20, None, VOCAB]


def test_a_wide_vocabulary_is_drawn_from_in_proportion_too() -> None:
    """Draws are made in blocks of tokens: of equally likely ones the noise must find the one in its own proportion."""
    vocab, draws = 32_000 + 77, 200
    tokens = sample(torch.zeros(1, vocab).expand(draws, -1), states([SamplingParams(1)] * draws), range(draws))
    for place, token in enumerate(tokens):
        assert token.token_id == int(uniform(0, place) * vocab)


def test_logprobs_do_not_change_what_is_drawn() -> None:
    logits_RV = random_logits(20)
    without = sample(logits_RV, states([SamplingParams(1, seed=9)] * 20), range(20))
    with_logprobs = sample(logits_RV, states([SamplingParams(1, seed=9, logprobs=2)] * 20), range(20))
    assert [token.token_id for token in with_logprobs] == [token.token_id for token in without]


def test_logprobs_do_not_know_of_biases_and_penalties() -> None:
    logits_1V = random_logits(1)
    params = SamplingParams(1, 0.0, repetition_penalty=2.0, presence_penalty=2.0, logit_bias=((3, 100.0),), logprobs=2)
    [token] = sample(logits_1V, [state(params, [1, 2], [3, 4])], [4])
    expected_V = torch.log_softmax(logits_1V[0], dim=-1)
    assert token.token_id == 3
    assert token.logprobs is not None
    assert token.logprobs.logprob == pytest.approx(float(expected_V[3]), abs=1e-6)
    assert [token_id for token_id, _ in token.logprobs.top] == expected_V.topk(2).indices.tolist()


def test_of_equally_likely_tokens_the_chosen_one_comes_first_among_the_alternatives() -> None:
    logits_RV = torch.zeros(1, 50)
    (token,) = sample(logits_RV, states([SamplingParams(max_tokens=1, temperature=0, logprobs=3)]), [0])
    assert token.logprobs is not None
    assert token.logprobs.top[0][0] == token.token_id
    assert len({token_id for token_id, _ in token.logprobs.top}) == 3


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 20, VOCAB])
def test_of_equally_likely_tokens_the_lowest_ids_are_listed_and_come_first(count: int) -> None:
    few_RV = torch.randint(0, 3, (8, VOCAB), generator=torch.Generator().manual_seed(count)).float()
    for logits_V, told in zip(few_RV, token_logprobs(few_RV, [0] * 8, [count] * 8), strict=True):
        by_hand = sorted(range(VOCAB), key=lambda token_id: (-logits_V[token_id], token_id))
        assert [token_id for token_id, _ in told.top] == by_hand[:count]

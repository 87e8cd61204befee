"""In fp32 a row has the same bits whatever rows are beside it, wherever it stands, on any number of threads."""

from collections.abc import Callable, Iterator

import pytest
import torch

from kernels.choose import choose_kernels
from kernels.cpu.swiglu import swiglu_by_rows
from kernels.grouped_mlp import swiglu
from kernels.kernels import Kernels
from router.model.moe import choose_experts
from router.sampling.logprobs import token_logprobs

CPU = torch.device("cpu")
ROWS = 300
# Batches in which other engines' texts have changed (44 and 257 rows), and others around powers of two.
BATCHES = (1, 2, 3, 4, 5, 7, 8, 16, 17, 33, 44, 63, 65, 128, 255, 256, 257, 299)
WIDTHS = (1, 7, 24, 48, 128, 513)
"""24: as other libraries' tails go. 513: where oneDNN begins to sum in blocks."""

Compute = Callable[[torch.Tensor], torch.Tensor]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1, 2], ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    return request.param


@pytest.fixture
def kernels(threads: int) -> Kernels:
    return choose_kernels(CPU, torch.float32, threads)


def assert_same_rows(compute: Compute, x: torch.Tensor, whole: torch.Tensor | None = None) -> None:
    """compute(x)'s rows, or `whole`'s, are those of any piece of x."""
    whole = compute(x) if whole is None else whole
    for count in BATCHES:
        for first in (0, (len(x) - count) // 2, len(x) - count):
            rows = slice(first, first + count)
            assert torch.equal(compute(x[rows].clone()), whole[rows]), f"{count} rows from {first} on"


@pytest.mark.parametrize("inputs", WIDTHS)
@pytest.mark.parametrize("outputs", [5, 64])
def test_a_linear_layer(kernels: Kernels, outputs: int, inputs: int) -> None:
    assert_same_rows(kernels.linear(random(outputs, inputs, seed=1)), random(ROWS, inputs))


def test_a_norm(kernels: Kernels) -> None:
    for width in WIDTHS:
        assert_same_rows(kernels.norm(random(width, seed=1), 1e-5), random(ROWS, width))


def test_a_linear_layer_on_more_threads() -> None:
    weight_OI, x_NI = random(1024, 700, seed=1), random(ROWS, 700)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(choose_kernels(CPU, torch.float32, threads).linear(weight_OI)(x_NI))
    assert torch.equal(*results)


@pytest.mark.parametrize("width", [24, 250])
def test_experts(kernels: Kernels, width: int) -> None:
    experts = [kernels.expert(random(2 * width, 32, seed=e), random(32, width, seed=9 - e)) for e in range(7)]
    x_ND = random(ROWS, 32)
    for number, expert in enumerate(experts):
        whole_ND = kernels.grouped_mlp(x_ND, [expert], [ROWS])
        # Alone; and after, before and between rows of other experts.
        assert_same_rows(lambda rows_ND, expert=expert: kernels.grouped_mlp(rows_ND, [expert], [len(rows_ND)]), x_ND)
        for counts in ([1] * 7, [5, 1, 2, 3, 1, 1, 44], [40, 41, 42, 43, 44, 45, 45], [0, 1, 0, 2, 0, 256, 1]):
            rows = slice(sum(counts[:number]), sum(counts[: number + 1]))
            y_ND = kernels.grouped_mlp(x_ND[: sum(counts)], experts, counts)
            assert torch.equal(y_ND[rows], whole_ND[rows]), counts


def test_swiglu_is_the_same_by_one_thread_and_by_several(threads: int) -> None:
    kernels = choose_kernels(CPU, torch.float32, threads)
    for width in (1, 24, 250):
        x_NF2 = random(ROWS, 2 * width) * 20
        h_NF = swiglu_by_rows(x_NF2)
        torch.testing.assert_close(h_NF, swiglu(x_NF2), rtol=2e-6, atol=1e-9)
        assert_same_rows(lambda rows: swiglu_by_rows(rows, kernels.cores), x_NF2, h_NF)


@pytest.mark.parametrize("experts_per_token", [1, 2, 4])
def test_scores_of_experts(threads: int, experts_per_token: int) -> None:
    logit_TE = random(1000, 16)
    expert_TA, score_TA = choose_experts(logit_TE, experts_per_token)
    torch.testing.assert_close(score_TA, torch.sigmoid(logit_TE.gather(1, expert_TA)), rtol=1e-6, atol=1e-38)
    for part, whole in enumerate((expert_TA, score_TA)):
        assert_same_rows(lambda rows, part=part: choose_experts(rows, experts_per_token)[part], logit_TE, whole)


@pytest.mark.parametrize("vocab", [199, 4096, 100_003])
def test_logprobs(threads: int, vocab: int) -> None:
    logits_RV = random(45, vocab)
    told = token_logprobs(logits_RV, [1] * 45, [2] * 45)
    assert told[0].logprob == pytest.approx(float(logits_RV[0].log_softmax(-1)[1]), rel=1e-6)
    for first, end in [(row, row + 1) for row in range(45)] + [(1, 45), (3, 5)]:
        assert token_logprobs(logits_RV[first:end], [1] * (end - first), [2] * (end - first)) == told[first:end]

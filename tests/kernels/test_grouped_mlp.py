"""The experts' arithmetic against its slow twin and against transformers; and the linear layer under it."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from kernels.choose import choose_kernels
from kernels.cores import Cores
from kernels.cpu.processor import LEVELS, this_processor
from kernels.grouped_mlp import grouped_mlp_reference, swiglu
from kernels.kernels import Kernels, TorchKernels

EXPERTS, HIDDEN, WIDTH = 5, 24, 40
CPU = torch.device("cpu")
COUNTS = {
    "even": [3, 3, 3, 3, 3],
    "uneven": [1, 7, 2, 30, 4],
    "one token": [0, 0, 1, 0, 0],
    "all on one expert": [0, 64, 0, 0, 0],
    "empty groups between": [2, 0, 0, 5, 0],
}


def random(*shape: int, std: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std).to(dtype)


@pytest.fixture(scope="module")
def theirs() -> Llama4TextExperts:
    """transformers' experts, whose weights the tests use too."""
    config = Llama4TextConfig(hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=EXPERTS)
    module = Llama4TextExperts(config)
    module.gate_up_proj.data = random(EXPERTS, HIDDEN, 2 * WIDTH, std=0.3, seed=1)
    module.down_proj.data = random(EXPERTS, WIDTH, HIDDEN, std=0.3, seed=2)
    return module.requires_grad_(False)


@pytest.fixture(params=["torch", *LEVELS])
def kernels_of(request: pytest.FixtureRequest) -> Callable[[torch.dtype], Kernels]:
    """Plain torch, and what is chosen for this processor and for lesser ones."""
    if request.param == "torch":
        return lambda dtype: TorchKernels(CPU, dtype, Cores(1, "test"))
    processor = this_processor().lowered_to(request.param)
    return lambda dtype: choose_kernels(CPU, dtype, 1, processor)


KernelsOf = Callable[[torch.dtype], Kernels]


def expert_of_rows(counts: Sequence[int]) -> torch.Tensor:
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def ours(kernels_of: KernelsOf, module: Llama4TextExperts, x_ND: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    dtype, kernels = x_ND.dtype, kernels_of(x_ND.dtype)
    experts = [
        kernels.expert(module.gate_up_proj[e].to(dtype).t(), module.down_proj[e].to(dtype).t()) for e in range(EXPERTS)
    ]
    return kernels.grouped_mlp(x_ND, experts, counts)


def transformers_result(module: Llama4TextExperts, x_ND: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """All rows through all experts, of which each row's own is taken."""
    copy = Llama4TextExperts(
        Llama4TextConfig(hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=EXPERTS)
    ).requires_grad_(False)
    copy.load_state_dict(module.state_dict())
    y_END = copy.to(x_ND.dtype)(x_ND.repeat(EXPERTS, 1)).view(EXPERTS, -1, HIDDEN)
    return y_END[expert_of_rows(counts), torch.arange(len(x_ND))]


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_grouped_rows_match_the_slow_twin(kernels_of: KernelsOf, theirs: Llama4TextExperts, counts: list[int]) -> None:
    x_ND = random(sum(counts), HIDDEN)
    slow = grouped_mlp_reference(x_ND, theirs.gate_up_proj, theirs.down_proj, expert_of_rows(counts))
    torch.testing.assert_close(ours(kernels_of, theirs, x_ND, counts), slow, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_grouped_rows_match_transformers(kernels_of: KernelsOf, theirs: Llama4TextExperts, counts: list[int]) -> None:
    x_ND = random(sum(counts), HIDDEN)
    expected = transformers_result(theirs, x_ND, counts)
    torch.testing.assert_close(ours(kernels_of, theirs, x_ND, counts), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_we_are_as_close_to_the_truth_as_transformers(
    kernels_of: KernelsOf, theirs: Llama4TextExperts, dtype: torch.dtype
) -> None:
    """Truth: the rounded weights and rows, computed in float64."""
    counts = COUNTS["uneven"]
    x_ND = random(sum(counts), HIDDEN, dtype=dtype)
    weights = (theirs.gate_up_proj.to(dtype).double(), theirs.down_proj.to(dtype).double())
    truth_ND = grouped_mlp_reference(x_ND.double(), *weights, expert_of_rows(counts))
    our_error = (ours(kernels_of, theirs, x_ND, counts).double() - truth_ND).square().mean().sqrt()
    their_error = (transformers_result(theirs, x_ND, counts).double() - truth_ND).square().mean().sqrt()
    assert float(our_error) < 1.1 * float(their_error)


def test_no_rows_at_all_give_no_rows(kernels_of: KernelsOf, theirs: Llama4TextExperts) -> None:
    assert ours(kernels_of, theirs, random(0, HIDDEN), [0] * EXPERTS).shape == (0, HIDDEN)


def test_groups_that_do_not_add_up_are_a_defect(kernels_of: KernelsOf, theirs: Llama4TextExperts) -> None:
    with pytest.raises(AssertionError, match="6 rows in groups, 5 given"):
        ours(kernels_of, theirs, random(5, HIDDEN), [2, 1, 1, 1, 1])


def test_the_gate_is_the_first_half_of_the_columns() -> None:
    gate_up_NF2 = torch.tensor([[0.0, 1.0, 10.0, 100.0]])
    assert torch.allclose(swiglu(gate_up_NF2), torch.tensor([[0.0, 100.0 / (1 + torch.e**-1)]]))


# Kernels.linear

SHAPES = [(1, 1), (3, 7), (17, 33), (64, 128), (200, 5), (127, 96)]
ROWS = [0, 1, 2, 3, 5, 16, 17, 64, 257]
# Half a unit in the last place of the result; what the sum over the columns loses is within 1e-4.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_laid_out_linear_is_a_linear(kernels_of: KernelsOf, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight_OI = random(*shape, seed=3, dtype=dtype)
    linear = kernels_of(dtype).linear(weight_OI)
    for rows in ROWS:
        x_NI = random(rows, shape[1], seed=rows, dtype=dtype)
        y_NO = linear(x_NI)
        assert (y_NO.shape, y_NO.dtype) == ((rows, shape[0]), dtype)
        truth_NO = F.linear(x_NI.double(), weight_OI.double())
        torch.testing.assert_close(y_NO.double(), truth_NO, rtol=ROUNDING[dtype], atol=1e-4)


def test_a_transposed_weight_is_laid_out_as_it_reads(kernels_of: KernelsOf) -> None:
    """The checkpoint's experts are [in, out]; their transposed views are passed on without a copy."""
    weight_IO, x_NI = random(7, 11, seed=4), random(3, 7)
    linear = kernels_of(torch.float32).linear(weight_IO.t())
    torch.testing.assert_close(linear(x_NI), x_NI @ weight_IO, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_rows_that_are_not_contiguous_are_read_as_they_are(kernels_of: KernelsOf, dtype: torch.dtype) -> None:
    weight_OI, x_IN = random(11, 7, seed=4, dtype=dtype), random(7, 6, dtype=dtype)
    truth_NO = F.linear(x_IN.t().double(), weight_OI.double())
    y_NO = kernels_of(dtype).linear(weight_OI)(x_IN.t())
    torch.testing.assert_close(y_NO.double(), truth_NO, rtol=ROUNDING[dtype], atol=1e-4)

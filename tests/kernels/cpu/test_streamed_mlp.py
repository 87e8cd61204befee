"""Experts with few rows, streamed, against the plain twin; and that what cannot be streamed is not."""

from itertools import accumulate

import pytest
import torch

from kernels.choose import choose_kernels
from kernels.cores import Cores
from kernels.cpu.processor import this_processor
from kernels.cpu.streamed_linear import StreamedLinear
from kernels.cpu.streamed_mlp import streamed_mlp, streamed_weights
from kernels.cpu_grouped_mlp import even_parts
from kernels.grouped_mlp import grouped_mlp_reference
from kernels.packed_linear import OneDnnLinear, onednn_supports

D, F = 128, 192
NARROW_F = 48  # a width that oneDNN pads
CPU = torch.device("cpu")
ONE_CORE = choose_kernels(CPU, torch.bfloat16, 1)
needs_the_instruction = pytest.mark.skipif(
    not this_processor().avx512_bf16, reason="this processor has no AVX512-BF16; it never uses these loops"
)


def weights(experts: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(experts, D, 2 * F, generator=generator) * D**-0.5
    down = torch.randn(experts, F, D, generator=generator) * F**-0.5
    return gate_up.to(dtype), down.to(dtype)


def rows(count: int) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(1)).bfloat16()


@needs_the_instruction
@pytest.mark.parametrize("counts", [[1], [2], [3], [4], [1, 4, 2, 3, 1]], ids=str)
@pytest.mark.parametrize("cores", [1, 2, 3])
def test_streamed_rows_match_the_slow_twin(counts: list[int], cores: int) -> None:
    gate_up_EDF2, down_EFD = weights(len(counts))
    experts = [ONE_CORE.expert(g.t(), d.t()) for g, d in zip(gate_up_EDF2, down_EFD, strict=True)]
    streamed = [expert.streamed for expert in experts if expert.streamed is not None]
    assert len(streamed) == len(experts)
    x_ND, expert_N = rows(sum(counts)), torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    y_ND, first_rows = torch.empty_like(x_ND), [0, *accumulate(counts)][:-1]
    streamed_mlp(Cores(cores, "test"), x_ND, streamed, first_rows, counts, y_ND)
    exact_ND = grouped_mlp_reference(x_ND.float(), gate_up_EDF2.float(), down_EFD.float(), expert_N)
    assert (y_ND - exact_ND).abs().max() < 0.02 * exact_ND.abs().max()


@needs_the_instruction
def test_a_row_gets_the_same_whatever_rows_stand_beside_it() -> None:
    gate_up_EDF2, down_EFD = weights(1)
    expert = ONE_CORE.expert(gate_up_EDF2[0].t(), down_EFD[0].t())
    x_ND = rows(4)
    together = ONE_CORE.grouped_mlp(x_ND, [expert], [4])
    apart = torch.cat([ONE_CORE.grouped_mlp(x_D[None], [expert], [1]) for x_D in x_ND])
    assert torch.equal(together, apart)


@needs_the_instruction
def test_experts_with_few_and_with_many_rows_keep_their_order() -> None:
    counts = [1, 40, 2, 2, 9, 1]
    gate_up_EDF2, down_EFD = weights(len(counts))
    experts = [ONE_CORE.expert(g.t(), d.t()) for g, d in zip(gate_up_EDF2, down_EFD, strict=True)]
    x_ND, expert_N = rows(sum(counts)), torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    exact_ND = grouped_mlp_reference(x_ND.float(), gate_up_EDF2.float(), down_EFD.float(), expert_N)
    assert (ONE_CORE.grouped_mlp(x_ND, experts, counts) - exact_ND).abs().max() < 0.02 * exact_ND.abs().max()


def test_a_width_that_onednn_pads_is_computed_right() -> None:
    generator = torch.Generator().manual_seed(0)
    gate_up_DF2 = (torch.randn(D, 2 * NARROW_F, generator=generator) * D**-0.5).bfloat16()
    down_FD = (torch.randn(NARROW_F, D, generator=generator) * NARROW_F**-0.5).bfloat16()
    x_ND = rows(2)
    exact_ND = grouped_mlp_reference(
        x_ND.float(), gate_up_DF2.float()[None], down_FD.float()[None], torch.zeros(2, dtype=torch.int64)
    )
    y_ND = ONE_CORE.grouped_mlp(x_ND, [ONE_CORE.expert(gate_up_DF2.t(), down_FD.t())], [2])
    assert (y_ND - exact_ND).abs().max() < 0.02 * exact_ND.abs().max()


@pytest.mark.parametrize("most_rows", [3, 9], ids=["few rows", "few and many rows"])
@pytest.mark.parametrize("num_experts", [5, 6, 11, 24])
def test_several_cores_give_what_one_gives(num_experts: int, most_rows: int) -> None:
    gate_up_EDF2, down_EFD = weights(num_experts)
    experts = [ONE_CORE.expert(g.t(), d.t()) for g, d in zip(gate_up_EDF2, down_EFD, strict=True)]
    counts = [1 + i % most_rows for i in range(num_experts)]
    x_ND = rows(sum(counts))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        y_ND = choose_kernels(CPU, torch.bfloat16, 2).grouped_mlp(x_ND, experts, counts)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(y_ND, ONE_CORE.grouped_mlp(x_ND, experts, counts))


@pytest.mark.skipif(not onednn_supports(torch.bfloat16), reason="oneDNN packs no bf16 on this processor")
@pytest.mark.parametrize(
    "shape",
    [(100, 64), (128, 63), (128, 48), (96, 128)],
    ids=["outputs", "odd inputs", "padded inputs", "half a column"],
)
def test_odd_shapes_are_left_to_onednn(shape: tuple[int, int]) -> None:
    outputs, inputs = shape
    gate_up = OneDnnLinear(torch.zeros(2 * outputs, inputs, dtype=torch.bfloat16))
    assert streamed_weights(gate_up, OneDnnLinear(torch.zeros(inputs, outputs, dtype=torch.bfloat16))) is None


def test_fp32_is_left_to_onednn() -> None:
    assert streamed_weights(OneDnnLinear(torch.zeros(128, 64)), OneDnnLinear(torch.zeros(64, 64))) is None


@needs_the_instruction
def test_only_a_processor_that_streams_makes_experts_say_so() -> None:
    gate_up_EDF2, down_EFD = weights(1)
    lowered = choose_kernels(CPU, torch.bfloat16, 1, this_processor().lowered_to("avx512"))
    assert ONE_CORE.expert(gate_up_EDF2[0].t(), down_EFD[0].t()).streamed is not None
    assert lowered.expert(gate_up_EDF2[0].t(), down_EFD[0].t()).streamed is None


@pytest.mark.parametrize(
    ("costs", "parts", "bounds"),
    [([1, 1, 1, 3], 2, [0, 3, 4]), ([1] * 6, 3, [0, 2, 4, 6]), ([5], 2, [0, 1, 1]), ([9, 1, 1], 2, [0, 1, 3])],
)
def test_cores_get_even_parts(costs: list[int], parts: int, bounds: list[int]) -> None:
    assert even_parts(costs, parts) == bounds


@needs_the_instruction
@pytest.mark.parametrize("outputs", [64, 4096, 4160, 2**13 + 64], ids=str)
@pytest.mark.parametrize("num_rows", [0, 1, 3, 4, 5])
@pytest.mark.parametrize("cores", [1, 3])
def test_a_streamed_linear_gives_what_onednn_gives(outputs: int, num_rows: int, cores: int) -> None:
    inputs = 576
    weight_OI = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)).bfloat16()
    x_NI = torch.randn(num_rows, inputs, generator=torch.Generator().manual_seed(1)).bfloat16()
    linear = choose_kernels(CPU, torch.bfloat16, cores).linear(weight_OI)
    assert isinstance(linear, StreamedLinear)
    exact_NO = x_NI.double() @ weight_OI.double().t()
    torch.testing.assert_close(linear(x_NI).double(), exact_NO, rtol=0.005, atol=0.01)

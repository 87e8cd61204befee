"""bf16 weights on a processor without bf16 products: exactly the fp32 product, rounded once."""

import pytest
import torch

from kernels.choose import choose_kernels
from kernels.cpu.processor import Processor
from kernels.linear import TorchLinear
from kernels.packed_linear import Fp16Linear, Fp32Linear, OneRowApart, fp16_scale

CPU = torch.device("cpu")
AVX2 = Processor(avx2=True, avx512=False, avx512_bf16=False, amx=False)
AVX512 = Processor(avx2=True, avx512=True, avx512_bf16=False, amx=False)
SHAPES = [(1, 1), (3, 7), (17, 33), (64, 128), (200, 5), (127, 96), (1024, 512)]
ROWS = [0, 1, 2, 3, 4, 5, 16, 17, 64, 257]
needs_fbgemm = pytest.mark.skipif(not Fp16Linear.is_available(), reason="torch packs nothing with FBGEMM here")


def random(*shape: int, std: float = 1.0, seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std).bfloat16()


def without_extremes(weight_OI: torch.Tensor) -> torch.Tensor:
    """All weights within 2^-20 of the largest, or 0."""
    return torch.where(weight_OI.abs() < weight_OI.abs().max() * 2.0**-20, 0, weight_OI)


def assert_is_the_fp32_product(y_NO: torch.Tensor, x_NI: torch.Tensor, weight_OI: torch.Tensor) -> None:
    """Within half a unit of bf16, and what sums in another order differ by."""
    assert y_NO.dtype == torch.bfloat16
    product_NO = x_NI.float() @ weight_OI.float().t()
    size_NO = x_NI.float().abs() @ weight_OI.float().abs().t()
    assert ((y_NO.float() - product_NO).abs() <= product_NO.abs() * 2**-8 + size_NO * 2**-20).all()


@needs_fbgemm
@pytest.mark.parametrize("processor", [AVX2, AVX512], ids=["avx2", "avx512"])
@pytest.mark.parametrize("std", [1e-6, 0.02, 1.0, 1e4], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bf16_layers_give_the_fp32_product_rounded(shape: tuple[int, int], std: float, processor: Processor) -> None:
    weight_OI = without_extremes(random(*shape, std=std, seed=1))
    linear = choose_kernels(CPU, torch.bfloat16, 1, processor).linear(weight_OI)
    several = linear.several if isinstance(linear, OneRowApart) else linear
    assert isinstance(several, Fp16Linear)
    for rows in ROWS:
        x_NI = random(rows, shape[1], seed=2)
        y_NO = linear(x_NI)
        assert y_NO.shape == (rows, shape[0])
        assert_is_the_fp32_product(y_NO, x_NI, weight_OI)


@needs_fbgemm
@pytest.mark.parametrize("small", [2.0**-40, 2.0**-60, 1e-30], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 17])
def test_a_weight_that_fp16_cannot_hold_takes_the_fp32_product(small: float, rows: int) -> None:
    weight_OI = without_extremes(random(64, 32, seed=1))
    weight_OI[:, 1:] = 0
    weight_OI[3, 0] = 0
    weight_OI[3, 5] = small
    linear = choose_kernels(CPU, torch.bfloat16, 1, AVX2).linear(weight_OI)
    assert isinstance(linear, OneRowApart)
    assert isinstance(linear.several, Fp32Linear)
    x_NI = random(rows, 32, seed=2)
    y_NO = linear(x_NI)
    assert_is_the_fp32_product(y_NO, x_NI, weight_OI)
    assert torch.equal(y_NO[:, 3], (x_NI[:, 5].float() * weight_OI[3, 5].float()).bfloat16())


@pytest.mark.parametrize(
    ("weights", "scale"),
    [
        ([1.0, -(2.0**-30)], 2.0**15),
        ([0.0, 0.0], 2.0**16),
        ([65280.0, 2.0**-17], 1.0),
        ([131072.0, 1.0], 0.25),
        ([2.0**120, 2.0**100], 2.0**-105),
        ([2.0**-120], 2.0**100),
        ([1.0, 2.0**-39], 2.0**15),
        ([1.0, 1.0078125 * 2.0**-39], None),
        ([1.0, 2.0**-40], None),
        ([1.0, float("nan")], None),
        ([1.0, float("inf")], None),
    ],
    ids=str,
)
def test_the_scale_is_a_power_of_two_that_loses_nothing(weights: list[float], scale: float | None) -> None:
    assert fp16_scale(torch.tensor([weights]).bfloat16()) == scale


def test_no_weights_at_all_have_a_scale() -> None:
    assert fp16_scale(torch.empty(0, 4, dtype=torch.bfloat16)) is not None


def test_weights_as_models_have_them_are_exact() -> None:
    """One in 3000 of these is below 2^-17, where fp16 itself would lose bits."""
    weight_OI = random(1024, 1024, std=0.02)
    assert not torch.equal(weight_OI.half().float(), weight_OI.float())
    assert fp16_scale(weight_OI) is not None


@needs_fbgemm
def test_only_avx2_alone_keeps_the_weight_for_one_row() -> None:
    weight_OI = random(8, 8)
    alone, with_avx512 = (
        choose_kernels(CPU, torch.bfloat16, 1, processor).linear(weight_OI) for processor in (AVX2, AVX512)
    )
    assert isinstance(alone, OneRowApart)
    assert isinstance(alone.one, TorchLinear)
    assert isinstance(with_avx512, Fp16Linear)


@needs_fbgemm
def test_an_expert_is_packed_like_a_layer() -> None:
    expert = choose_kernels(CPU, torch.bfloat16, 1, AVX512).expert(random(16, 8), random(8, 8))
    assert isinstance(expert.gate_up, Fp16Linear)
    assert isinstance(expert.down, Fp16Linear)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_are_packed_as_on_any_processor(dtype: torch.dtype) -> None:
    weight_OI = torch.ones(8, 8, dtype=dtype)
    plain, best = (choose_kernels(CPU, dtype, 1, processor).linear(weight_OI) for processor in (AVX2, None))
    assert type(plain) is type(best)


def test_the_number_of_torchs_threads_stays() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        choose_kernels(CPU, torch.bfloat16, 2, AVX2).linear(random(64, 64))(random(3, 64))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)

"""bf16 weights on a processor without bf16 products: exactly the fp32 product, rounded once."""

import subprocess
import sys

import pytest
import torch

from kernels.choose import choose_kernels
from kernels.cpu.processor import Processor
from kernels.linear import TorchLinear
from kernels.packed_linear import Fp16Linear, Fp32Linear, OneRowApart, fp16_scale
from tests.loopback import PATIENCE_S

CPU = torch.device("cpu")
AVX2 = Processor(avx2=True, avx512=False, avx512_bf16=False, amx=False)
AVX512 = Processor(avx2=True, avx512=True, avx512_bf16=False, amx=False)
SHAPES = [(1, 1), (3, 7), (17, 33), (64, 128), (200, 5), (127, 96), (1024, 512)]
ROWS = [0, 1, 2, 3, 4, 5, 16, 17, 64, 257]
# Prints by how many bytes one call raises the process's peak.
PEAK_OF_FP16_SCALE = """
import resource
import torch
from kernels.packed_linear import fp16_scale
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
fp16_scale(torch.ones(1024, 1024, dtype=torch.bfloat16))
weight = torch.full((2**13, 2**14), 0.02, dtype=torch.bfloat16)
before = peak()
assert fp16_scale(weight)
print(peak() - before)
"""
# Prints how many bytes of memory, other than of files, 128 packed weights take for each number.
BYTES_PER_WEIGHT = """
import re
import torch
from pathlib import Path
from kernels.packed_linear import Fp16Linear, pack_without_bf16_products
taken = lambda: 1024 * int(re.search(r"Anonymous: *([0-9]+)", Path("/proc/self/smaps_rollup").read_text())[1])
weight = torch.full((512, 1024), 0.02, dtype=torch.bfloat16)
def pack():
    linear = pack_without_bf16_products(weight)
    assert isinstance(linear, Fp16Linear)
    return linear
first, before = pack(), taken()
linears = [pack() for _ in range(128)]
print((taken() - before) / (128 * 512 * 1024))
"""
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
    several = linear.several if isinstance(linear, OneRowApart) else linear  # AVX2 alone
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
        ([65536.0, 1.0], None),
        ([2.0**120, 2.0**100], None),
        ([2.0**-120], 2.0**100),
        ([1.0, 2.0**-39], 2.0**15),
        ([1.0, 1.0078125 * 2.0**-39], None),
        ([1.0, 2.0**-40], None),
        ([1.0, float("nan")], None),
        ([float("nan"), 1.0], None),
        ([1.0, float("inf")], None),
    ],
    ids=str,
)
def test_the_scale_is_a_power_of_two_that_loses_nothing(weights: list[float], scale: float | None) -> None:
    assert fp16_scale(torch.tensor([weights]).bfloat16()) == scale


def test_no_weights_at_all_have_a_scale() -> None:
    assert fp16_scale(torch.empty(0, 4, dtype=torch.bfloat16)) is not None


def test_a_weight_is_looked_at_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.packed_linear._SLICE", 32)
    weight_OI = without_extremes(random(9, 8))
    weight_OI[8, 7] = 32.0
    assert fp16_scale(weight_OI) == 2.0**10
    weight_OI[2, 3] = 1.0078125 * 2.0**-40
    assert fp16_scale(weight_OI) is None


def test_looking_for_a_scale_takes_little_memory_whatever_the_size() -> None:
    """256 MB of weights, whose fp32 copy would have 512 MB."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK_OF_FP16_SCALE], check=True, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert int(done.stdout) < 64 * 2**20


@needs_fbgemm
def test_packing_many_weights_takes_two_bytes_a_weight() -> None:
    """Temporary copies in fp32 would leave holes between the packed weights: 4 bytes a weight in all."""
    done = subprocess.run(
        [sys.executable, "-c", BYTES_PER_WEIGHT], check=True, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert 2 <= float(done.stdout) < 3.3


@needs_fbgemm
@pytest.mark.parametrize("std", [2.0**-60, 0.02, 1.0], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_huge_and_tiny_rows_give_what_fp32_gives(rows: int, std: float) -> None:
    """Scaling the result back instead would overflow: 2^120 times a weight that was scaled to 2^15."""
    weight_OI = without_extremes(random(48, 96, std=std, seed=1))
    linear = choose_kernels(CPU, torch.bfloat16, 1, AVX512).linear(weight_OI)
    assert isinstance(linear, Fp16Linear)
    for size in (2.0**120, 1e36, 1.0, 2.0**-50):
        x_NI = random(rows, 96, std=size, seed=2)
        y_NO = linear(x_NI)
        assert y_NO.isfinite().all()
        assert_is_the_fp32_product(y_NO, x_NI, weight_OI)


def test_weights_as_models_have_them_are_exact() -> None:
    """One in 3000 of these is below 2^-17, where fp16 itself would lose bits."""
    weight_OI = random(1024, 1024, std=0.02)
    assert not torch.equal(weight_OI.half().float(), weight_OI.float())
    assert fp16_scale(weight_OI) is not None


@needs_fbgemm
def test_only_avx2_alone_keeps_a_layer_twice_for_one_row() -> None:
    weight_OI = random(8, 8)
    alone, with_avx512 = (
        choose_kernels(CPU, torch.bfloat16, 1, processor).linear(weight_OI) for processor in (AVX2, AVX512)
    )
    assert isinstance(alone, OneRowApart)
    assert isinstance(alone.one, TorchLinear)
    assert isinstance(with_avx512, Fp16Linear)


@needs_fbgemm
@pytest.mark.parametrize("processor", [AVX2, AVX512], ids=["avx2", "avx512"])
def test_an_expert_is_kept_once(processor: Processor) -> None:
    """Experts are nearly all of the weights: a second copy would double the memory."""
    expert = choose_kernels(CPU, torch.bfloat16, 1, processor).expert(random(16, 8), random(8, 8))
    assert isinstance(expert.gate_up, Fp16Linear)
    assert isinstance(expert.down, Fp16Linear)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_are_packed_as_on_any_processor(dtype: torch.dtype) -> None:
    weight_OI = torch.ones(8, 8, dtype=dtype)
    plain, best = (choose_kernels(CPU, dtype, 1, processor).linear(weight_OI) for processor in (AVX2, None))
    assert type(plain) is type(best)


@needs_fbgemm
@pytest.mark.parametrize(("rows", "threads"), [(1, 1), (16, 1), (17, 2)])
def test_a_small_fp16_product_takes_one_thread(rows: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = choose_kernels(CPU, torch.bfloat16, 2, AVX512).linear(random(512, 512))
    used, product, before = [], Fp16Linear._product, torch.get_num_threads()

    def counting_threads(self: Fp16Linear, x_NI: torch.Tensor) -> torch.Tensor:
        used.append(torch.get_num_threads())
        return product(self, x_NI)

    monkeypatch.setattr(Fp16Linear, "_product", counting_threads)
    try:
        torch.set_num_threads(2)
        linear(random(rows, 512))
    finally:
        torch.set_num_threads(before)
    assert used == [threads]


def test_the_number_of_torchs_threads_stays() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        choose_kernels(CPU, torch.bfloat16, 2, AVX2).linear(random(64, 64))(random(3, 64))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)

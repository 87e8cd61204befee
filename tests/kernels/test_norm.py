"""The norm in one pass against its slow twin, which the parity tests hold against transformers."""

import pytest
import torch

from kernels.choose import choose_kernels
from kernels.norm import CpuNorm, TorchNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 32), (7, 512), (33, 40)], ids=str)
def test_one_pass_gives_what_torch_gives(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TD = (torch.randn(shape, generator=generator) * 3).to(dtype)
    weight_D = torch.randn(shape[1], generator=generator).to(dtype)
    plain, fast = (norm(weight_D, 1e-5)(x_TD).float() for norm in (TorchNorm, CpuNorm))
    # A sum in another order may round one bf16 the other way, and the weight's product then once more.
    assert torch.allclose(plain, fast, rtol=2e-6 if dtype == torch.float32 else 2**-6, atol=1e-7)
    assert dtype == torch.float32 or (plain != fast).float().mean() < 0.01


def test_rows_of_zeros_stay_zeros() -> None:
    assert torch.equal(CpuNorm(torch.ones(8), 1e-5)(torch.zeros(2, 8)), torch.zeros(2, 8))


def test_half_precision_is_left_to_torch() -> None:
    kernels = choose_kernels(torch.device("cpu"), torch.float16, 1)
    assert isinstance(kernels.norm(torch.ones(8, dtype=torch.float16), 1e-5), TorchNorm)

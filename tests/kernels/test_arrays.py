"""Tensors as the arrays that compiled loops take."""

import numpy as np
import pytest
import torch

from kernels.arrays import as_numpy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_an_array_shares_the_tensors_memory_and_strides(dtype: torch.dtype) -> None:
    x = torch.arange(12).view(3, 4).to(dtype).t()[1:]
    array = as_numpy(x)
    assert array.shape == x.shape
    x[2, 1] = 0
    assert array[2, 1] == 0
    assert array.ctypes.data == x.data_ptr()


def test_bf16_is_seen_as_the_bits_of_uint16() -> None:
    assert as_numpy(torch.tensor([1.0, -2.0]).bfloat16()).tolist() == [0x3F80, 0xC000]
    assert as_numpy(torch.zeros(1).bfloat16()).dtype == np.uint16

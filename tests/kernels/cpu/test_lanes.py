"""Sixteen queries side by side, against plain torch."""

import numpy as np
import pytest
import torch

from kernels.arrays import as_numpy
from kernels.cpu.compiled import compiled
from kernels.cpu.lanes import LANES, LOWEST, pair_rows, product_of_eight, product_of_one, scale_rows, weigh


@compiled()
def _weigh(score, seen, scale, highest, total, shrink):
    addresses = highest.ctypes.data, total.ctypes.data, shrink.ctypes.data
    weigh(score.ctypes.data, len(score), seen.ctypes.data, scale, addresses[0], addresses[1], addresses[2])
    return score[0, 0] + seen[0] + highest[0] + total[0] + shrink[0]


@compiled()
def _pair_rows(x, pairs):
    pair_rows(x.ctypes.data, len(x), pairs.ctypes.data)
    return x[0, 0] + pairs[0, 0]


@compiled()
def _scale_rows(x, factor):
    scale_rows(x.ctypes.data, len(x), factor.ctypes.data)
    return x[0, 0] + factor[0]


@compiled()
def _product(a, b, eight, one):
    product_of_eight(a.ctypes.data, a.strides[0], a.shape[1], b.ctypes.data, eight.ctypes.data, a[0, 0])
    product_of_one(a.ctypes.data, a.strides[0], a.shape[1], b.ctypes.data, one.ctypes.data, a[0, 0])
    return b[0, 0] + eight[0, 0] + one[0, 0]


def randn(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("positions", [1, 5, 64])
def test_weights_of_several_blocks_are_those_of_one_softmax(positions: int) -> None:
    scores, scale = 20 * randn(3, positions, LANES), 0.3
    seen = np.arange(3 * positions, 3 * positions - LANES, -1).clip(1).astype(np.int32)
    highest, total = np.full(LANES, LOWEST, np.float32), np.zeros(LANES, np.float32)
    weights = scores.copy()
    for b, block in enumerate(weights):
        shrink = np.empty(LANES, np.float32)
        _weigh(block, seen - np.int32(b * positions), np.float32(scale), highest, total, shrink)
        weights[:b] *= shrink
    flat = torch.from_numpy(scores).double().flatten(0, 1) * scale
    flat[torch.arange(len(flat))[:, None] >= torch.from_numpy(seen)] = -torch.inf
    np.testing.assert_allclose(weights.reshape(-1, LANES) / total, torch.softmax(flat, 0), rtol=2e-5, atol=1e-7)


def test_rows_are_paired_as_bf16_rounded_as_torch_does() -> None:
    x, pairs = randn(6, LANES), np.empty((3, LANES), np.uint32)
    x[0, :4] = 0.0, 1 + 2**-8, 1 + 3 * 2**-8, -3e38
    _pair_rows(x, pairs)
    expected = as_numpy(torch.from_numpy(x).bfloat16())
    np.testing.assert_array_equal(pairs & 0xFFFF, expected[::2])
    np.testing.assert_array_equal(pairs >> 16, expected[1::2])


def test_rows_are_scaled_lane_by_lane() -> None:
    x, factor = randn(5, LANES), randn(LANES)
    scaled = x * factor
    _scale_rows(x, factor)
    np.testing.assert_array_equal(x, scaled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [1, 7, 64])
def test_products_are_added(dtype: torch.dtype, columns: int) -> None:
    a, b = torch.from_numpy(randn(8, columns)).to(dtype), randn(columns, LANES)
    eight, one = np.ones((8, LANES), np.float32), np.ones((1, LANES), np.float32)
    _product(as_numpy(a), b, eight, one)
    exact = 1 + a.double().numpy() @ b
    np.testing.assert_allclose(eight, exact, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(one, exact[:1], rtol=1e-4, atol=1e-4)

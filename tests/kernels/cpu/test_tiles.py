"""Products in tiles, and what others had configured before."""

import numpy as np
import pytest
import torch

from kernels.arrays import as_numpy
from kernels.cpu import tiles
from kernels.cpu.compiled import compiled
from kernels.cpu.processor import detect
from kernels.cpu.tiles import tile_configure, tile_configured, tile_dot, tile_load, tile_store, tile_zero
from kernels.packed_linear import OneDnnLinear

pytestmark = pytest.mark.skipif(not detect().amx, reason="a processor without AMX")


@compiled()
def _multiply(configuration, before, a, b, out):
    tile_configured(before.ctypes.data)
    tile_configure(configuration.ctypes.data)
    tile_zero(0)
    tile_load(4, a.ctypes.data, a.strides[0])
    tile_load(5, b.ctypes.data, b.strides[0])
    tile_dot(0, 4, 5)
    tile_dot(0, 4, 5)
    tile_store(0, out.ctypes.data, out.strides[0])
    tile_configured(configuration.ctypes.data)
    tile_configure(before.ctypes.data)
    before[0] += 0


@compiled()
def _configured(out):
    tile_configured(out.ctypes.data)
    out[0] += 0


def product_twice() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(what tiles make of 2 a b, the same exactly, the configuration before)."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).bfloat16() for shape in ((16, 32), (32, 16)))
    pairs = b.view(16, 2, 16).transpose(1, 2).contiguous()
    out, before = np.zeros((16, 16), np.float32), np.zeros(64, np.uint8)
    _multiply(tiles.configuration(), before, as_numpy(a), as_numpy(pairs), out)
    return out, (2 * a.double() @ b.double()).numpy(), before


def test_a_product_is_added_to_the_tile() -> None:
    out, exact, _ = product_twice()
    np.testing.assert_allclose(out, exact, rtol=1e-5, atol=1e-5)


def test_what_was_configured_before_is_so_again() -> None:
    *_, before = product_twice()
    after = np.ones(64, np.uint8)
    _configured(after)
    np.testing.assert_array_equal(after, before)


def test_onednn_computes_the_same_before_and_after() -> None:
    """It keeps a configuration of its own."""
    generator = torch.Generator().manual_seed(1)
    linear = OneDnnLinear(torch.randn(512, 512, generator=generator).bfloat16())
    x = torch.randn(64, 512, generator=generator).bfloat16()
    before = linear(x)
    for _ in range(3):
        product_twice()
        assert torch.equal(linear(x), before)

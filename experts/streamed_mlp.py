"""SwiGLU for experts that have few rows each: weights stream from memory as fast as it gives them.

oneDNN's product of one row with a packed bf16 weight reads 11 GB/s on one core, because it computes in tiles made for
many rows and does not look ahead; this one reads 14, and 29 on two cores where the memory's limit is 31. It reads the
same packed weights, whose layout it checks first. For processors with AVX512-BF16; others never come here.

Legend: N rows, D model width, F expert width.
"""

import ctypes
from collections.abc import Sequence
from functools import cache

import llvmlite.binding
import numpy as np
import torch
from numba import njit

from experts.linear import Linear, OneDnnLinear, make_linear
from experts.numerics import FAST, as_numpy, exp_of_negative, four_rows, from_float, one_row, to_float, two_rows

# With more rows oneDNN's tiles are as fast.
MAX_ROWS = 4
COLUMN = 64  # outputs


def streams(linear: Linear) -> bool:
    """Whether a layer's weight can be streamed by this file's loops."""
    return (
        isinstance(linear, OneDnnLinear)
        and linear.dtype == torch.bfloat16
        and linear.address % 64 == 0
        and _is_supported()
        and _is_packed_as_expected(linear.outputs, linear.inputs)
    )


@cache
def _is_supported() -> bool:
    """Whether this processor has the instruction."""
    try:
        return bool(llvmlite.binding.get_host_cpu_features().get("avx512bf16"))
    except RuntimeError:  # LLVM does not know this system
        return False


@cache
def _is_packed_as_expected(outputs: int, inputs: int) -> bool:
    """Whether oneDNN packs weights of this shape as [O / 64, I / 2, 64, 2], without padding; looked up in memory."""
    if outputs % COLUMN or inputs % 32:  # it pads inputs to whole tiles of 32
        return False
    numbers_OI = (torch.arange(outputs * inputs) % 2**15).to(torch.int16).view(outputs, inputs)
    linear = make_linear(numbers_OI.view(torch.bfloat16))
    assert isinstance(linear, OneDnnLinear)
    packed = torch.frombuffer(bytearray(ctypes.string_at(linear.address, 2 * outputs * inputs)), dtype=torch.int16)
    expected = numbers_OI.view(outputs // COLUMN, COLUMN, inputs // 2, 2).permute(0, 2, 1, 3)
    return torch.equal(packed.view(expected.shape), expected)


def streamed_mlp(
    x_ND: torch.Tensor, gate_up: Sequence[Linear], down: Sequence[Linear], counts: Sequence[int]
) -> torch.Tensor:
    """y_ND: what grouped_mlp gives; each of the layers must pass `streams`."""
    y_ND = torch.empty_like(x_ND)
    if gate_up:
        gate_up_addresses, down_addresses = (
            np.array([linear.address for linear in linears if isinstance(linear, OneDnnLinear)])
            for linears in (gate_up, down)
        )
        assert len(gate_up_addresses) == len(down_addresses) == len(counts)
        assert isinstance(down[0], OneDnnLinear)
        width, y = down[0].inputs, as_numpy(y_ND)
        _compute(gate_up_addresses, down_addresses, np.array(counts), as_numpy(x_ND), width, y)
    return y_ND


@njit(nogil=True, cache=True, error_model="numpy")
def _product(weights, x_NI, outputs, out_NO):
    """out_NO, fp32: the rows times a packed weight."""
    rows, inputs = x_NI.shape
    for column in range(outputs // COLUMN):
        row = 0
        while row < rows:
            left = rows - row
            step = 4 if left >= 4 else 2 if left >= 2 else 1
            place = weights + column * inputs * 2 * COLUMN
            x, out = x_NI[row:].ctypes.data, out_NO[row:, column * COLUMN :].ctypes.data
            if step == 4:
                four_rows(place, inputs // 2, x, x_NI.strides[0], out, out_NO.strides[0])
            elif step == 2:
                two_rows(place, inputs // 2, x, x_NI.strides[0], out, out_NO.strides[0])
            else:
                one_row(place, inputs // 2, x, x_NI.strides[0], out, out_NO.strides[0])
            row += step


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _swiglu(gate_up_NF2, like, h_NF):
    """silu(gate) * up, rounded where torch rounds: after the product, after silu, and after the multiplication."""
    width = h_NF.shape[1]
    for n in range(len(h_NF)):
        for f in range(width):
            gate = to_float(from_float(gate_up_NF2[n, f], like))
            up = to_float(from_float(gate_up_NF2[n, width + f], like))
            small = exp_of_negative(-abs(gate))
            sigmoid = (np.float32(1) if gate >= 0 else small) / (np.float32(1) + small)
            h_NF[n, f] = from_float(to_float(from_float(gate * sigmoid, like)) * up, like)


@njit(nogil=True, cache=True, error_model="numpy")
def _compute(gate_up, down, counts, x_ND, width, y_ND):
    most = counts.max()
    outputs = x_ND.shape[1]
    gate_up_NF2 = np.empty((most, 2 * width), np.float32)
    h_NF = np.empty((most, width), np.uint16)
    sums_ND = np.empty((most, outputs), np.float32)
    row = 0
    for e in range(len(counts)):
        rows = counts[e]
        _product(gate_up[e], x_ND[row : row + rows], 2 * width, gate_up_NF2)
        _swiglu(gate_up_NF2, np.uint16(0), h_NF[:rows])
        _product(down[e], h_NF[:rows], outputs, sums_ND)
        for n in range(rows):
            for d in range(outputs):
                y_ND[row + n, d] = from_float(sums_ND[n, d], np.uint16(0))
        row += rows

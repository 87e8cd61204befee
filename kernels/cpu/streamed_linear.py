"""A linear layer whose weight is read as fast as memory gives it, for few rows.

oneDNN's product of one row with a packed bf16 weight reads 11 GB/s on one core, because it computes in tiles made for
many rows and does not look ahead; this one reads 14, and 29 on two cores where the memory's limit is 31. It reads the
same packed weights, whose layout it checks first. For processors with AVX512-BF16; others never come here.

Legend: N rows, I inputs, O outputs.
"""

import ctypes
from functools import cache
from typing import TypeGuard

import llvmlite.binding
import numpy as np
import torch

from kernels.cores import Cores
from kernels.cpu.compiled import compiled
from kernels.cpu.counters import take
from kernels.cpu.numerics import as_numpy, four_rows, from_float, one_row, two_rows
from kernels.linear import Linear, OneDnnLinear, make_linear

# With more rows oneDNN's tiles are as fast.
MAX_ROWS = 4
COLUMN = 64  # outputs
# As many parts as keep all cores busy to the end, but none so small that taking it costs.
PARTS_PER_CORE = 4
# Weights; fewer are read before another thread has begun.
_WORTH_A_THREAD = 2**17
# Of a weight whose packing is looked up; the packing of a larger one is that of its first outputs.
_LOOKED_UP = 2**22


def make_streamed(weight_OI: torch.Tensor, cores: Cores) -> Linear:
    """What `make_linear` makes, but that a few rows at a time stream the weight, where that gains."""
    linear = make_linear(weight_OI)
    return _StreamedLinear(linear, cores) if is_streamable(linear) else linear


class _StreamedLinear:
    def __init__(self, linear: OneDnnLinear, cores: Cores) -> None:
        self._linear, self._cores = linear, cores

    def __call__(self, x_NI: torch.Tensor) -> torch.Tensor:
        rows, outputs = len(x_NI), self._linear.outputs
        if not 0 < rows <= MAX_ROWS:
            return self._linear(x_NI)
        assert x_NI.shape[1] == self._linear.inputs
        assert x_NI.dtype == self._linear.dtype
        y_NO = torch.empty(rows, outputs, dtype=x_NI.dtype)
        parts = min(PARTS_PER_CORE * self._cores.threads, outputs // COLUMN)
        counter, address, x, y = (
            np.zeros(1, np.int64),
            self._linear.address,
            as_numpy(x_NI.contiguous()),
            as_numpy(y_NO),
        )
        threads = 1 + outputs * self._linear.inputs // _WORTH_A_THREAD
        self._cores.run(lambda: _multiply(counter, parts, address, x, y), min(parts, threads))
        return y_NO


def is_streamable(linear: Linear) -> TypeGuard[OneDnnLinear]:
    """Whether a layer's weight can be read by `product`."""
    return (
        isinstance(linear, OneDnnLinear)
        and linear.dtype == torch.bfloat16
        and linear.address % 64 == 0
        and is_supported()
        and _is_packed_as_expected(
            min(linear.outputs, -(-_LOOKED_UP // linear.inputs // COLUMN) * COLUMN), linear.inputs
        )
        and linear.outputs % COLUMN == 0
    )


@cache
def is_supported() -> bool:
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


@compiled()
def product(weights, x_NI, first, last, out_NO):
    """out_NO, fp32: the rows times columns first..last-1 of a packed weight."""
    rows, inputs = x_NI.shape
    for column in range(first, last):
        row = 0
        while row < rows:
            left = rows - row
            step = 4 if left >= 4 else 2 if left >= 2 else 1
            place = weights + column * inputs * 2 * COLUMN
            x, out = x_NI[row:].ctypes.data, out_NO[row:, (column - first) * COLUMN :].ctypes.data
            if step == 4:
                four_rows(place, inputs // 2, x, x_NI.strides[0], out, out_NO.strides[0])
            elif step == 2:
                two_rows(place, inputs // 2, x, x_NI.strides[0], out, out_NO.strides[0])
            else:
                one_row(place, inputs // 2, x, x_NI.strides[0], out, out_NO.strides[0])
            row += step


@compiled()
def _multiply(counter, parts, weight, x_NI, y_NO):
    """y_NO, of which each part is a run of columns; counter: the next part."""
    columns = y_NO.shape[1] // COLUMN
    sums = np.empty((len(x_NI), (columns // parts + 1) * COLUMN), np.float32)
    while True:
        part = take(counter)
        if part >= parts:
            return
        first, last = columns * part // parts, columns * (part + 1) // parts
        product(weight, x_NI, first, last, sums)
        for n in range(len(x_NI)):
            for o in range((last - first) * COLUMN):
                y_NO[n, first * COLUMN + o] = from_float(sums[n, o], y_NO[0, 0])

"""A linear layer that streams its weight at the speed of memory, for up to MAX_ROWS rows.

oneDNN's product of one row with a packed bf16 weight reads 11 GB/s on one core: it computes in
tiles made for many rows, and prefetches nothing. This kernel reads 14 GB/s, and 29 on two cores,
where memory gives 31. It reads the weight as oneDNN has packed it, after checking that the packing
is the expected one. It needs AVX512-BF16.

Legend: N rows, I inputs, O outputs.
"""

import ctypes
from functools import cache
from typing import TypeGuard

import numpy as np
import torch

from kernels.arrays import as_numpy
from kernels.cores import Cores
from kernels.cpu.compiled import compiled
from kernels.cpu.counters import take
from kernels.cpu.numerics import four_rows, from_float, one_row, two_rows
from kernels.linear import Linear
from kernels.packed_linear import OneDnnLinear

# With more rows oneDNN's tiles are as fast.
MAX_ROWS = 4
COLUMN = 64  # outputs
# Enough parts to keep all cores busy to the end, and each large enough to be worth taking.
PARTS_PER_CORE = 4
# A thread is used for each so many weights. Fewer are read before another thread has begun.
_WEIGHTS_PER_THREAD = 2**17
# A larger weight is packed like its first outputs, of so many weights: only these are checked.
_CHECKED_WEIGHTS = 2**22


class StreamedLinear:
    """Like `linear`, which must be streamable, but up to MAX_ROWS rows stream the weight."""

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
        threads = 1 + outputs * self._linear.inputs // _WEIGHTS_PER_THREAD
        self._cores.run(lambda: _multiply(counter, parts, address, x, y), min(parts, threads))
        return y_NO


def is_streamable(linear: Linear) -> TypeGuard[OneDnnLinear]:
    """Whether `product` can read a layer's weight: bf16, in the packing that it expects."""
    return (
        isinstance(linear, OneDnnLinear)
        and linear.dtype == torch.bfloat16
        and linear.address % 64 == 0
        and linear.outputs % COLUMN == 0
        and _is_packed_as_expected(
            min(linear.outputs, -(-_CHECKED_WEIGHTS // linear.inputs // COLUMN) * COLUMN),
            linear.inputs,
            torch.get_num_threads(),
        )
    )


@cache
def _is_packed_as_expected(outputs: int, inputs: int, threads: int) -> bool:
    """Whether oneDNN packs weights of this shape as [O / 64, I / 2, 64, 2], without padding.

    Found by packing consecutive numbers and reading the packed memory. threads: torch's now, on
    which oneDNN's choice depends where a weight is small.
    """
    if outputs % COLUMN or inputs % 32:  # oneDNN pads inputs to whole tiles of 32
        return False
    numbers_OI = (torch.arange(outputs * inputs) % 2**15).to(torch.int16).view(outputs, inputs)
    linear = OneDnnLinear(numbers_OI.view(torch.bfloat16))
    packed = torch.frombuffer(bytearray(ctypes.string_at(linear.address, 2 * outputs * inputs)), dtype=torch.int16)
    expected = numbers_OI.view(outputs // COLUMN, COLUMN, inputs // 2, 2).permute(0, 2, 1, 3)
    return torch.equal(packed.view(expected.shape), expected)


@compiled()
def product(weights, x_NI, first, last, out_NO):
    """out_NO, fp32: the rows times columns first..last-1 of a packed weight.

    weights: its address.
    """
    rows, inputs = x_NI.shape
    for column in range(first, last):
        row = 0
        while row < rows:
            left = rows - row
            step = 4 if left >= 4 else 2 if left >= 2 else 1
            packed = weights + column * inputs * 2 * COLUMN
            x, out = x_NI[row:].ctypes.data, out_NO[row:, (column - first) * COLUMN :].ctypes.data
            if step == 4:
                four_rows(packed, inputs // 2, x, x_NI.strides[0], out, out_NO.strides[0])
            elif step == 2:
                two_rows(packed, inputs // 2, x, x_NI.strides[0], out, out_NO.strides[0])
            else:
                one_row(packed, inputs // 2, x, x_NI.strides[0], out, out_NO.strides[0])
            row += step


@compiled()
def _multiply(counter, parts, weight, x_NI, y_NO):
    """Compute y_NO in parts, each a run of columns, until none is left. counter: the next part."""
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

"""SwiGLU for experts that have few rows each: weights stream from memory as fast as it gives them.

oneDNN's product of one row with a packed bf16 weight reads 11 GB/s on one core, because it computes in tiles made for
many rows and does not look ahead; this one reads 14, and 29 on two cores where the memory's limit is 31. It reads the
same packed weights, whose layout it checks first. For processors with AVX512-BF16; others never come here.

The work of each expert is cut into parts where there are few experts, first those of gate and up, then those of down;
cores take them one by one.

Legend: N rows, D model width, F expert width.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import TypeGuard

import llvmlite.binding
import numpy as np
import torch

from experts.compiled import compiled
from experts.cores import Cores
from experts.counters import take, wait_for
from experts.linear import Linear, OneDnnLinear, make_linear
from experts.numerics import FAST, as_numpy, exp_of_negative, four_rows, from_float, one_row, to_float, two_rows

# With more rows oneDNN's tiles are as fast.
MAX_ROWS = 4
COLUMN = 64  # outputs
# As many parts as keep all cores busy to the end, but none so small that taking it costs.
_PARTS_PER_CORE = 4


def streams(gate_up: Linear, down: Linear) -> bool:
    """Whether an expert's weights can be streamed by this file's loops."""
    return _is_streamable(gate_up) and _is_streamable(down) and down.inputs % COLUMN == 0


def _is_streamable(linear: Linear) -> TypeGuard[OneDnnLinear]:
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
    cores: Cores,
    x_ND: torch.Tensor,
    gate_up: Sequence[Linear],
    down: Sequence[Linear],
    first_rows: Sequence[int],
    counts: Sequence[int],
    y_ND: torch.Tensor,
) -> None:
    """Put into y_ND what each expert i makes of the counts[i] rows of x_ND from first_rows[i] on.

    gate_up, down: the experts' layers, which must pass `streams`.
    """
    gate_up_addresses, down_addresses = (
        np.array([linear.address for linear in linears if isinstance(linear, OneDnnLinear)])
        for linears in (gate_up, down)
    )
    assert len(gate_up_addresses) == len(down_addresses) == len(first_rows) == len(counts)
    assert isinstance(down[0], OneDnnLinear)
    x, y = as_numpy(x_ND), as_numpy(y_ND)
    h = np.empty((len(x), down[0].inputs), x.dtype)
    firsts, lengths = np.array(first_rows), np.array(counts)
    parts = -(-_PARTS_PER_CORE * cores.threads // len(counts)) if cores.threads > 1 else 1
    counters = np.zeros(1 + len(counts), np.int64)
    cores.run(
        lambda: _compute(counters, parts, gate_up_addresses, down_addresses, firsts, lengths, x, h, y),
        len(counts) * parts,
    )


@compiled()
def _product(weights, x_NI, first, last, out_NO):
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


@compiled(fastmath=FAST)
def _swiglu(gate_NF, up_NF, h_NF):
    """silu(gate) * up, rounded where torch rounds: after the product, after silu, and after the multiplication."""
    like = h_NF[0, 0]
    for n in range(len(h_NF)):
        for f in range(h_NF.shape[1]):
            gate = to_float(from_float(gate_NF[n, f], like))
            up = to_float(from_float(up_NF[n, f], like))
            small = exp_of_negative(-abs(gate))
            sigmoid = (np.float32(1) if gate >= 0 else small) / (np.float32(1) + small)
            h_NF[n, f] = from_float(to_float(from_float(gate * sigmoid, like)) * up, like)


@compiled()
def _compute(counters, parts, gate_up, down, firsts, counts, x_ND, h_NF, y_ND):
    """Items 0..E*parts-1 are parts of h_NF, the next as many are parts of y_ND. counters: the next item, then each
    expert's parts of h_NF that are done."""
    h_columns, y_columns = h_NF.shape[1] // COLUMN, y_ND.shape[1] // COLUMN
    most, items = counts.max(), len(counts) * parts
    gate = np.empty((most, h_NF.shape[1]), np.float32)
    up = np.empty((most, h_NF.shape[1]), np.float32)
    sums = np.empty((most, y_ND.shape[1]), np.float32)
    while True:
        item = take(counters)
        if item >= 2 * items:
            return
        e, part = (item % items) // parts, item % parts
        rows, end = firsts[e], firsts[e] + counts[e]
        if item < items:
            first, last = h_columns * part // parts, h_columns * (part + 1) // parts
            _product(gate_up[e], x_ND[rows:end], first, last, gate)
            _product(gate_up[e], x_ND[rows:end], h_columns + first, h_columns + last, up)
            _swiglu(gate, up, h_NF[rows:end, first * COLUMN : last * COLUMN])
            take(counters, 1 + e)
        else:
            wait_for(counters, 1 + e, parts)
            first, last = y_columns * part // parts, y_columns * (part + 1) // parts
            _product(down[e], h_NF[rows:end], first, last, sums)
            for n in range(end - rows):
                for d in range((last - first) * COLUMN):
                    y_ND[rows + n, first * COLUMN + d] = from_float(sums[n, d], y_ND[0, 0])

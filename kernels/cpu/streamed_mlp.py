"""SwiGLU for experts with few rows each: weights are streamed as in streamed_linear.py.

Cores take items one by one. An item is a part of one expert's gate and up, or later of its down.
The fewer experts there are, the more parts each is cut into.

Legend: N rows, D model width, F expert width.
"""

from collections.abc import Sequence

import numpy as np
import torch

from kernels.arrays import as_numpy
from kernels.cores import Cores
from kernels.cpu.compiled import compiled
from kernels.cpu.counters import take, wait_for
from kernels.cpu.numerics import FAST, from_float, silu, to_float
from kernels.cpu.streamed_linear import COLUMN, PARTS_PER_CORE, is_streamable, product
from kernels.grouped_mlp import StreamedWeights
from kernels.linear import Linear


def streamed_weights(gate_up: Linear, down: Linear) -> StreamedWeights | None:
    """Where `streamed_mlp` reads the weights of two layers; None if it cannot."""
    if is_streamable(gate_up) and is_streamable(down) and down.inputs % COLUMN == 0:
        return StreamedWeights(gate_up.address, down.address, down.inputs)
    return None


def streamed_mlp(
    cores: Cores,
    x_ND: torch.Tensor,
    experts: Sequence[StreamedWeights],
    first_rows: Sequence[int],
    counts: Sequence[int],
    y_ND: torch.Tensor,
) -> None:
    """For each expert i, compute rows first_rows[i] .. + counts[i] - 1 of y_ND from x_ND's."""
    assert len(experts) == len(first_rows) == len(counts)
    gate_up, down = np.array([each.gate_up for each in experts]), np.array([each.down for each in experts])
    x, y = as_numpy(x_ND), as_numpy(y_ND)
    h = np.empty((len(x), experts[0].width), x.dtype)
    firsts, lengths = np.array(first_rows), np.array(counts)
    parts = -(-PARTS_PER_CORE * cores.threads // len(counts)) if cores.threads > 1 else 1
    counters = np.zeros(1 + len(counts), np.int64)
    cores.run(
        lambda: _compute(counters, parts, gate_up, down, firsts, lengths, x, h, y),
        len(counts) * parts,
    )


@compiled(fastmath=FAST)
def _swiglu(gate_NF, up_NF, h_NF):
    """silu(gate) * up, rounded where torch rounds: after the product, after silu, and after the
    multiplication."""
    like = h_NF[0, 0]
    for n in range(len(h_NF)):
        for f in range(h_NF.shape[1]):
            gate = to_float(from_float(gate_NF[n, f], like))
            up = to_float(from_float(up_NF[n, f], like))
            h_NF[n, f] = from_float(to_float(from_float(silu(gate), like)) * up, like)


@compiled()
def _compute(counters, parts, gate_up, down, firsts, counts, x_ND, h_NF, y_ND):
    """Items 0 .. E * parts - 1 are parts of h_NF; the next E * parts are parts of y_ND.

    counters: the next item, then for each expert how many of its parts of h_NF are done.
    """
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
            product(gate_up[e], x_ND[rows:end], first, last, gate)
            product(gate_up[e], x_ND[rows:end], h_columns + first, h_columns + last, up)
            _swiglu(gate, up, h_NF[rows:end, first * COLUMN : last * COLUMN])
            take(counters, 1 + e)
        else:
            wait_for(counters, 1 + e, parts)
            first, last = y_columns * part // parts, y_columns * (part + 1) // parts
            product(down[e], h_NF[rows:end], first, last, sums)
            for n in range(end - rows):
                for d in range((last - first) * COLUMN):
                    y_ND[rows + n, first * COLUMN + d] = from_float(sums[n, d], y_ND[0, 0])

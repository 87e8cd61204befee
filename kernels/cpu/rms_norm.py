"""A norm in one pass over each row, where torch needs six operations.

Its slow twin is TorchNorm (kernels/norm.py).

bf16 is seen as uint16; arithmetic is fp32.

Legend: T tokens of a step, D model width.
"""

import numpy as np

from kernels.cpu.compiled import compiled
from kernels.cpu.numerics import FAST, from_float, to_float


@compiled(fastmath=FAST)
def rms_norm(x_TD, weight_D, eps, out_TD):
    """out = x / rms(x) * weight for each row.

    It is rounded before the weight is applied, as in TorchNorm.
    """
    columns, like = x_TD.shape[1], x_TD[0, 0]
    for t in range(len(x_TD)):
        squares = np.float32(0)
        for d in range(columns):
            x = to_float(x_TD[t, d])
            squares += x * x
        factor = np.float32(1) / np.sqrt(squares / np.float32(columns) + eps)
        for d in range(columns):
            normed = to_float(from_float(to_float(x_TD[t, d]) * factor, like))
            out_TD[t, d] = from_float(normed * to_float(weight_D[d]), like)

"""silu(gate) * up in one pass, for fp32 rows. Its slow twin is `swiglu` (kernels/grouped_mlp.py).

torch.nn.functional.silu rounds the last numbers of a thread's share, which fill no vector,
otherwise than the others. So a row's result depends on the rows beside it and on the number of
threads. Here a column is computed the same way in every row.

Legend: N rows, F expert width.
"""

import numpy as np
import torch

from kernels.cores import Cores
from kernels.cpu.compiled import compiled
from kernels.cpu.counters import take
from kernels.cpu.numerics import FAST, silu

# Another core gains from this many numbers on.
_WORTH_A_THREAD = 2**15
_ROWS = 8  # of an item


def swiglu_by_rows(gate_up_NF2: torch.Tensor, cores: Cores | None = None) -> torch.Tensor:
    """h_NF. The gate is the first half of the columns.

    cores: which share the rows. By default the calling thread computes alone.
    """
    gate_up = gate_up_NF2.contiguous().numpy()
    h = np.empty((len(gate_up), gate_up.shape[1] // 2), np.float32)
    counter = np.zeros(1, np.int64)
    if cores is None:
        _swiglu(counter, gate_up, h)
    else:
        items = min(-(-len(h) // _ROWS), 1 + h.size // _WORTH_A_THREAD)
        cores.run(lambda: _swiglu(counter, gate_up, h), items)
    return torch.from_numpy(h)


@compiled(fastmath=FAST)
def _swiglu(counter, gate_up_NF2, h_NF):
    """counter: the next rows; several threads that share it share the work."""
    width = h_NF.shape[1]
    while True:
        first = take(counter) * _ROWS
        if first >= len(h_NF):
            return
        for n in range(first, min(first + _ROWS, len(h_NF))):
            for f in range(width):
                h_NF[n, f] = silu(gate_up_NF2[n, f]) * gate_up_NF2[n, width + f]

"""Measures how fast this machine's cores read memory: what the floor is computed with.

    python -m bench.bandwidth THREADS

Two reads of 2 GB, far more than any cache holds, and the faster one counts: the sum of a float32 array, and 1-row
products with bf16 matrices as the kernels lay them out, which is how weights are read in decoding.
"""

import json
import sys
import time
from collections.abc import Callable

import torch

from kernels.choose import choose_kernels

BUFFER_BYTES = 2 * 10**9
PASSES = 3
_ROWS, _COLUMNS = 2048, 512


def bytes_per_s(read: Callable[[], object], nbytes: int) -> float:
    """The fastest of PASSES, after one that is not counted."""
    read()
    seconds = []
    for _ in range(PASSES):
        began_s = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - began_s)
    return nbytes / min(seconds)


def measure(buffer_bytes: int = BUFFER_BYTES) -> dict[str, float]:
    """Bytes per second of each kind of read."""
    array = torch.ones(buffer_bytes // 4)
    result = {"sum": bytes_per_s(array.sum, array.nbytes)}
    del array
    matrix = torch.ones(_ROWS, _COLUMNS, dtype=torch.bfloat16)
    kernels = choose_kernels(torch.device("cpu"), matrix.dtype, torch.get_num_threads())
    linears = [kernels.linear(matrix) for _ in range(max(1, buffer_bytes // matrix.nbytes))]
    row = torch.ones(1, _COLUMNS, dtype=torch.bfloat16)
    result["packed"] = bytes_per_s(lambda: [linear(row) for linear in linears], len(linears) * matrix.nbytes)
    return result


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    print(json.dumps(measure()))

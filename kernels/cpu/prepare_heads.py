"""Rotates, norms and scales queries and keys, and stores keys and values, all in one pass.

torch needs one pass for each of these.

Its plain twin is TorchHeads (router/model/heads.py). bf16 is seen as uint16. Arithmetic is fp32,
rounded to bf16 wherever torch rounds between two operations.

Legend: T tokens of a step, H query heads, K key/value heads, J = H + 2 K, U units of the pool, P
positions of a block, C = head_dim columns.
"""

import numpy as np

from kernels.cpu.compiled import compiled
from kernels.cpu.counters import take
from kernels.cpu.numerics import FAST, from_float, to_float


@compiled(fastmath=FAST)
def prepare(counter, qkv_TJC, rotation_TC, norm_eps, temperature_T, unit_T, offset_T, k_UKPC, v_UKCP):
    """Rotate, norm and scale all queries and keys in place, and store keys and values.

    counter: the next token; several threads that share it share the work.
    rotation_TC: cosine and sine of pair i in columns 2i and 2i+1, or no rows for no rotation.
    norm_eps: of the RMS norm over each query's and key's columns, or 0 for no norm. temperature_T:
    factor on the queries, or empty.
    unit_T, offset_T: where each token's keys and values go.
    """
    kv_heads = k_UKPC.shape[1]
    heads, columns = qkv_TJC.shape[1] - 2 * kv_heads, qkv_TJC.shape[2]
    like = qkv_TJC[0, 0, 0]
    x = np.empty(columns, np.float32)
    while True:
        t = take(counter)
        if t >= len(qkv_TJC):
            return
        for j in range(heads + kv_heads):
            for c in range(columns):
                x[c] = to_float(qkv_TJC[t, j, c])
            if len(rotation_TC):
                for c in range(0, columns, 2):
                    a, b, cos, sin = x[c], x[c + 1], rotation_TC[t, c], rotation_TC[t, c + 1]
                    x[c] = to_float(from_float(a * cos - b * sin, like))
                    x[c + 1] = to_float(from_float(a * sin + b * cos, like))
            if norm_eps > 0:
                squares = np.float32(0)
                for c in range(columns):
                    squares += x[c] * x[c]
                factor = np.float32(1) / np.sqrt(squares / np.float32(columns) + norm_eps)
                for c in range(columns):
                    x[c] = to_float(from_float(x[c] * factor, like))
            if j < heads and len(temperature_T):
                for c in range(columns):
                    x[c] *= temperature_T[t]
            for c in range(columns):
                qkv_TJC[t, j, c] = from_float(x[c], like)
        unit, offset = unit_T[t], offset_T[t]
        for k in range(kv_heads):
            for c in range(columns):
                k_UKPC[unit, k, offset, c] = qkv_TJC[t, heads + k, c]
                v_UKCP[unit, k, c, offset] = qkv_TJC[t, heads + kv_heads + k, c]

"""Inner loops on a CPU: attention, which reads and writes blocks where they lie, and a norm in one pass.

Torch has no operation for the former, and six for the latter. Compiled by Numba to machine code for the processor at
hand on first use, and kept on disk. Each has a slow twin in plain torch (PlainAttention, PlainNorm), which it must
match. bf16 is seen here as uint16, because NumPy has no such type; arithmetic is fp32, and what torch would round to
bf16 between two operations is rounded here, too.

Legend: T tokens of a step, N spans, H query heads, K key/value heads, J = H + 2 K, G = H / K, U units of the pool,
P positions of a block, B blocks of a sequence, C = head_dim columns.
"""

import numpy as np

from experts.compiled import compiled
from experts.counters import take
from experts.numerics import FAST, exp_of_negative, from_float, to_float

_LANES = 4  # query heads that share one reading of a key or value
_LOWEST = np.float32(-1e30)


@compiled(fastmath=FAST)
def rms_norm(x_TD, weight_D, eps, out_TD):
    """out = x / rms(x) * weight for each row; rounded before the weight is applied, as in PlainNorm."""
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


@compiled(fastmath=FAST)
def prepare(counter, qkv_TJC, kv_heads, rotates, rotation_TC, norm_eps, temperature_T, unit_T, slot_T, k_UKPC, v_UKCP):
    """Turn, norm and temper the queries and keys of all tokens in place, and store their keys and values.

    counter: the next token; several threads that share it share the work.
    rotation_TC: cosine and sine of pair i in columns 2i and 2i+1; used if `rotates`. norm_eps: of the RMS norm over
    each query's and key's columns, or 0 for no norm. temperature_T: factor on the queries, or empty for none.
    """
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
            if rotates:
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
        unit, slot = unit_T[t], slot_T[t]
        for k in range(kv_heads):
            for c in range(columns):
                k_UKPC[unit, k, slot, c] = qkv_TJC[t, heads + k, c]
                v_UKCP[unit, k, c, slot] = qkv_TJC[t, heads + kv_heads + k, c]


@compiled(fastmath=FAST)
def attend(counter, q_NHC, k_UKPC, v_UKCP, block_NB, keys_N, scale, out_NHC):
    """out_NHC[n] = softmax(q_n k^T * scale) v over the first keys_N[n] positions of blocks block_NB[n].

    counter: the next of the N * K pairs (span, key/value head); several threads that share it share the work. One pass
    over the blocks with a running maximum (Milakov, Gimelshein 2018), so nothing of a sequence's length is stored.
    """
    kv_heads, positions, columns = k_UKPC.shape[1:]
    group = q_NHC.shape[1] // kv_heads
    q = np.empty((_LANES, columns), np.float32)
    weight = np.empty((_LANES, positions), np.float32)
    total = np.empty((_LANES, columns), np.float32)
    highest = np.empty(_LANES, np.float32)
    weight_sum = np.empty(_LANES, np.float32)
    shrink = np.empty(_LANES, np.float32)
    while True:
        pair = take(counter)
        if pair >= len(q_NHC) * kv_heads:
            return
        n, k = pair // kv_heads, pair % kv_heads
        keys = keys_N[n]
        for first in range(0, group, _LANES):
            lanes = min(_LANES, group - first)
            for g in range(_LANES):
                highest[g], weight_sum[g] = _LOWEST, np.float32(0)
                for c in range(columns):
                    total[g, c] = np.float32(0)
                    q[g, c] = np.float32(0)
            for g in range(lanes):
                for c in range(columns):
                    q[g, c] = to_float(q_NHC[n, k * group + first + g, c]) * scale
            for b in range((keys + positions - 1) // positions):
                unit = block_NB[n, b]
                seen = min(positions, keys - b * positions)
                for p in range(seen):
                    w0 = w1 = w2 = w3 = np.float32(0)
                    for c in range(columns):
                        x = to_float(k_UKPC[unit, k, p, c])
                        w0 += q[0, c] * x
                        w1 += q[1, c] * x
                        w2 += q[2, c] * x
                        w3 += q[3, c] * x
                    weight[0, p], weight[1, p], weight[2, p], weight[3, p] = w0, w1, w2, w3
                for g in range(_LANES):
                    top = highest[g]
                    for p in range(seen, positions):
                        weight[g, p] = _LOWEST
                    for p in range(positions):
                        top = max(top, weight[g, p])
                    shrink[g] = exp_of_negative(highest[g] - top)
                    highest[g] = top
                    s = np.float32(0)
                    for p in range(positions):
                        w = exp_of_negative(weight[g, p] - top)
                        weight[g, p] = w
                        s += w
                    weight_sum[g] = weight_sum[g] * shrink[g] + s
                for c in range(columns):
                    y0 = y1 = y2 = y3 = np.float32(0)
                    for p in range(seen):  # what lies beyond may be anything, even NaN
                        x = to_float(v_UKCP[unit, k, c, p])
                        y0 += weight[0, p] * x
                        y1 += weight[1, p] * x
                        y2 += weight[2, p] * x
                        y3 += weight[3, p] * x
                    total[0, c] = total[0, c] * shrink[0] + y0
                    total[1, c] = total[1, c] * shrink[1] + y1
                    total[2, c] = total[2, c] * shrink[2] + y2
                    total[3, c] = total[3, c] * shrink[3] + y3
            for g in range(lanes):
                h = k * group + first + g
                for c in range(columns):
                    out_NHC[n, h, c] = from_float(total[g, c] / weight_sum[g], out_NHC[0, 0, 0])


@compiled()
def copy_blocks(counter, block_B, k_UKPC, v_UKCP, k_KSC, v_KSC):
    """Copy the first S positions of blocks block_B together; S = k_KSC.shape[1], which need not fill the last block.

    counter: the next of the B * K pairs (block, key/value head); several threads that share it share the work.
    """
    kv_heads, positions, columns = k_UKPC.shape[1:]
    while True:
        pair = take(counter)
        if pair >= len(block_B) * kv_heads:
            return
        b, k = pair // kv_heads, pair % kv_heads
        unit, begin = block_B[b], b * positions
        for p in range(min(positions, k_KSC.shape[1] - begin)):
            for c in range(columns):
                k_KSC[k, begin + p, c] = k_UKPC[unit, k, p, c]
                v_KSC[k, begin + p, c] = v_UKCP[unit, k, c, p]

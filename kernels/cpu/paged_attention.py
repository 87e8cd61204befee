"""Paged attention on a CPU: keys and values are read in their blocks, and never copied together.

Queries that share a key/value head are handled 64 at a time, whether of one token or of several.
They visit the sequence's blocks one by one. For each block: scores, then weights by a softmax with
a running maximum, then the weighted sum of values (flash attention). Its plain twin is TorchHeads
(router/model/heads.py).

Scores and sums are both products of a matrix as the block holds it, keys [P, C] or values [C, P],
with a matrix whose 16 columns are queries. AMX tiles compute them where the processor has them,
otherwise vector instructions.

Legend: T tokens of a step, N spans, I groups of queries, Q = 16 queries of a group, H query heads,
K key/value heads, G = H / K, J = H + 2 K, U units of the pool, P positions of a block, B blocks of
a sequence, C = head_dim columns, M rows and N columns of a matrix.
"""

import numpy as np

from kernels.cpu import tiles
from kernels.cpu.compiled import compiled
from kernels.cpu.counters import take
from kernels.cpu.lanes import LANES, LOWEST, pair_rows, product_of_eight, product_of_one, scale_rows, weigh
from kernels.cpu.numerics import from_float, to_float
from kernels.cpu.tiles import tile_configure, tile_configured, tile_dot, tile_load, tile_store, tile_zero

GROUP = 64  # queries that pass each block together, while it is in the core's cache
_TILE = 32  # columns of a tile
_CONFIGURATION = tiles.configuration()


def fits_tiles(block_tokens: int, head_dim: int) -> bool:
    """Whether blocks and heads of bf16 are whole tiles of AMX."""
    return block_tokens % _TILE == 0 and head_dim % _TILE == 0


@compiled()
def attend(
    counter, uses_tiles, qkv_TJC, k_UKPC, v_UKCP, block_NB, keys_N, begin_N, length_N, span_I, first_I, scale, out_THC
):
    """out = softmax(q k^T * scale) v, each token of a span seeing the positions up to its own.

    counter: the next of the I * K pairs (group, key/value head); several threads that share it
    share the work.
    begin_N, length_N: of the spans' tokens. keys_N: positions that a span's last token sees, in
    blocks block_NB.
    span_I, first_I: group i has queries first_I[i] .. + 63 of span span_I[i], as far as there are
    so many. Query number t * H / K + g is of the span's token t and of the g-th head that shares
    the keys and values.
    """
    kv_heads, positions, columns = k_UKPC.shape[1:]
    sharers = out_THC.shape[1] // kv_heads
    query_tiles = GROUP // LANES
    q = np.zeros((query_tiles, columns, LANES), np.float32)
    q_pairs = np.zeros((query_tiles, columns // 2, LANES), np.uint32)
    total = np.empty((query_tiles, columns, LANES), np.float32)
    score = np.empty((positions, LANES), np.float32)
    weight_pairs = np.empty((positions // 2 + 1, LANES), np.uint32)
    last_values = np.empty((columns, positions), v_UKCP.dtype)
    highest = np.empty((query_tiles, LANES), np.float32)
    weight_sum = np.empty((query_tiles, LANES), np.float32)
    shrink = np.empty(LANES, np.float32)
    sees = np.zeros((query_tiles, LANES), np.int32)
    seen = np.empty(LANES, np.int32)
    configured = np.zeros(64, np.uint8)
    if uses_tiles:
        tile_configured(configured.ctypes.data)
        tile_configure(_CONFIGURATION.ctypes.data)
    while True:
        item = len(span_I) * kv_heads - 1 - take(counter)  # long spans come last, and take longest
        if item < 0:
            break
        i, k = item // kv_heads, item % kv_heads
        n, first = span_I[i], first_I[i]
        queries = min(GROUP, length_N[n] * sharers - first)
        past = keys_N[n] - length_N[n]
        used_tiles = (queries + LANES - 1) // LANES
        _take_queries(qkv_TJC[begin_N[n] :, k * sharers : (k + 1) * sharers], first, queries, q)
        for r in range(queries):
            sees[r // LANES, r % LANES] = past + (first + r) // sharers + 1
        for tile in range(used_tiles):
            if uses_tiles:
                pair_rows(q[tile].ctypes.data, columns, q_pairs[tile].ctypes.data)
            for lane in range(LANES):
                highest[tile, lane], weight_sum[tile, lane] = np.float32(LOWEST), np.float32(0)
        total[:used_tiles] = np.float32(0)
        seen_by_last = past + (first + queries - 1) // sharers + 1
        for b in range((seen_by_last + positions - 1) // positions):
            unit, used = block_NB[n, b], min(positions, seen_by_last - b * positions)
            keys, values = k_UKPC[unit, k], v_UKCP[unit, k]
            if uses_tiles and used < positions:
                values = _first_values(values, used, last_values)
            for tile in range(used_tiles):
                for lane in range(LANES):
                    seen[lane] = sees[tile, lane] - b * positions
                if uses_tiles:
                    _tile_product(keys, q_pairs[tile], False, score)
                else:
                    score[:] = np.float32(0)
                    _product(keys, columns, q[tile], score)
                weigh(
                    score.ctypes.data,
                    positions,
                    seen.ctypes.data,
                    scale,
                    highest[tile].ctypes.data,
                    weight_sum[tile].ctypes.data,
                    shrink.ctypes.data,
                )
                if b > 0:
                    scale_rows(total[tile].ctypes.data, columns, shrink.ctypes.data)
                if uses_tiles:
                    pair_rows(score.ctypes.data, positions, weight_pairs.ctypes.data)
                    _tile_product(values, weight_pairs, True, total[tile])
                else:
                    _product(values, used, score, total[tile])
        _put_results(total, weight_sum, first, queries, out_THC[begin_N[n] :, k * sharers : (k + 1) * sharers])
    if uses_tiles:
        tile_configure(configured.ctypes.data)
        # Numba frees an array after the last use that it sees, and does not see the one above.
        # This use keeps the memory until then.
        configured[0] = 0


@compiled()
def _take_queries(q_TGC, first, count, q_tiles):
    """Put queries first..first+count-1 of q_TGC into the lanes of q_tiles.

    Query r belongs to token r // G and head r % G.
    """
    sharers = q_TGC.shape[1]
    for r in range(count):
        t, g = (first + r) // sharers, (first + r) % sharers
        for c in range(q_TGC.shape[2]):
            q_tiles[r // LANES, c, r % LANES] = to_float(q_TGC[t, g, c])


@compiled()
def _put_results(total, weight_sum, first, count, out_TGC):
    """Put the same queries' weighted sums, divided by their sums of weights, into out_TGC."""
    sharers = out_TGC.shape[1]
    for r in range(count):
        t, g = (first + r) // sharers, (first + r) % sharers
        share = np.float32(1) / weight_sum[r // LANES, r % LANES]
        for c in range(out_TGC.shape[2]):
            out_TGC[t, g, c] = from_float(total[r // LANES, c, r % LANES] * share, out_TGC[0, 0, 0])


@compiled()
def _tile_product(a_MN, b_pairs, adds, out_MQ):
    """out = a b, or out += a b; M and N are multiples of 32. b_pairs: as `pair_rows` makes it."""
    from_row, step = a_MN.strides[0], 4 * LANES
    for m in range(0, a_MN.shape[0], _TILE):
        out = out_MQ[m:].ctypes.data
        if adds:
            tile_load(0, out, step)
            tile_load(1, out + 16 * step, step)
        else:
            tile_zero(0)
            tile_zero(1)
        for n in range(0, a_MN.shape[1], _TILE):
            a = a_MN[m, n:].ctypes.data
            tile_load(6, b_pairs[n // 2 :].ctypes.data, step)
            tile_load(4, a, from_row)
            tile_load(5, a + 16 * from_row, from_row)
            tile_dot(0, 4, 6)
            tile_dot(1, 5, 6)
        tile_store(0, out, step)
        tile_store(1, out + 16 * step, step)


@compiled()
def _product(a_MN, columns, b_NQ, out_MQ):
    """out += a b, of the first `columns` of a and rows of b."""
    rows, stride = a_MN.shape[0], a_MN.strides[0]
    a, b, out, like = a_MN.ctypes.data, b_NQ.ctypes.data, out_MQ.ctypes.data, a_MN[0, 0]
    m = 0
    while m + 8 <= rows:
        product_of_eight(a + m * stride, stride, columns, b, out + m * 4 * LANES, like)
        m += 8
    while m < rows:
        product_of_one(a + m * stride, stride, columns, b, out + m * 4 * LANES, like)
        m += 1


@compiled()
def _first_values(v_CP, count, copy_CP):
    """The values of the first `count` positions, then zeros: what lies there may be NaN, and 0
    times NaN is NaN."""
    for c in range(copy_CP.shape[0]):
        for p in range(count):
            copy_CP[c, p] = v_CP[c, p]
        copy_CP[c, count:] = 0
    return copy_CP

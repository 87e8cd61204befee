"""Experts to shards from nothing: how many copies of each, and the longest-processing-time rule with variances.

After FlashLB (vllm-ascend, policy_flashlb.py): a shard's load is judged at mean + Z * deviation,
with the covariances of the experts on it.

Legend: B tries side by side, L layers, E experts, S shards, N copies to place.
"""

import heapq

import numpy as np

from cluster.policy.layout import Bools, Floats, Ints, Rooms

Z = 0.674
"""Of the standard normal distribution: three of four windows are below mean + Z * deviation."""
EXPONENTS = (1.0, 0.8, 0.6, 0.4)
MAX_CELLS = 8_000_000
"""Covariances held at once: tries * shards * experts."""


def allotment(weight_E: Floats, extra: int, exponent: float, least: int, most: int) -> Ints:
    """copies_E: `least` of each expert, and `extra` more, one at a time to the largest weight**exponent / copies.

    With exponent 1 the largest share of a copy becomes as small as it can. Smaller ones cut light
    experts, too, which leaves small pieces to fill shards with. most: copies of one expert.

    >>> weight_E = np.array([600.0, 560, 120, 120, 20, 10, 10, 10])
    >>> allotment(weight_E, 8, 1.0, 1, 8).tolist(), allotment(weight_E, 8, 0.6, 1, 8).tolist()
    ([5, 5, 1, 1, 1, 1, 1, 1], [4, 4, 2, 2, 1, 1, 1, 1])
    """
    copies_E = np.full(len(weight_E), least, np.int64)
    key_E = np.maximum(weight_E, 0.0) ** exponent
    heap = [(-key / least, expert) for expert, key in enumerate(key_E.tolist()) if most > least]
    heapq.heapify(heap)
    while extra > 0 and heap:
        _, expert = heap[0]
        copies_E[expert] += 1
        extra -= 1
        copies = int(copies_E[expert])
        if copies < most:
            heapq.heapreplace(heap, (-float(key_E[expert]) / copies, expert))
        else:
            heapq.heappop(heap)
    return copies_E


def covariance(rows_WE: Floats) -> Floats:
    """cov_EE between experts over windows, shrunk towards independence as far as chance explains it.

    After Ledoit and Wolf. From few windows of many experts most covariances are chance; what is left
    of them is 1 - (their variance of estimation) / (their size squared), of all pairs together.

    >>> covariance(np.array([[1.0, 1.0, 3.0], [3.0, 3.0, 1.0]]))[0].tolist()  # always in step
    [1.0, 1.0, -1.0]
    """
    centred_WE = rows_WE - rows_WE.mean(axis=0)
    found_EE: Floats = centred_WE.T @ centred_WE / len(rows_WE)
    squares_WE = centred_WE**2
    chance_EE = (squares_WE.T @ squares_WE / len(rows_WE) - found_EE**2) / max(1, len(rows_WE) - 1)
    diagonal_E = found_EE.diagonal().copy()
    size = float((found_EE**2).sum() - (diagonal_E**2).sum())
    chance = float(chance_EE.sum() - chance_EE.diagonal().sum())
    found_EE *= 1.0 - min(1.0, max(0.0, chance / size)) if size > 0 else 0.0
    np.fill_diagonal(found_EE, diagonal_E)
    return found_EE


def risk_of_shards(held_ES: Bools, mean_E: Floats, cov_EE: Floats) -> Floats:
    """risk_S: mean + Z * deviation of each shard's load, if the copies of an expert share its load evenly."""
    share_ES = held_ES / np.maximum(held_ES.sum(axis=1), 1)[:, None]
    risk_S: Floats = mean_E @ share_ES
    if cov_EE.any():
        risk_S = risk_S + Z * np.sqrt(np.maximum(((cov_EE @ share_ES) * share_ES).sum(axis=0), 0.0))
    return risk_S


def pack(mean_LE: Floats, cov_LEE: Floats, layer_B: Ints, copies_BE: Ints, rooms: Rooms) -> Bools:
    """held_BES: the largest share first, each copy to the shard that then has the least mean + Z * deviation.

    layer_B: of each try. cov_LEE: see covariance. Never two copies of an expert on a shard; the first
    copies are on other nodes each. A copy that fits nowhere is left out.

    >>> rooms = Rooms(np.array([2, 2]), np.array([0, 0]), replicas=1)
    >>> mean, none = np.array([[4.0, 3.0, 2.0]]), np.zeros((1, 3, 3))
    >>> pack(mean, none, np.array([0]), np.array([[1, 1, 1]]), rooms).astype(int).tolist()
    [[[1, 0], [0, 1], [0, 1]]]
    """
    cells = max(1, mean_LE.shape[1] * len(rooms.slots_S))
    step = max(1, MAX_CELLS // cells)
    parts = [
        _pack(mean_LE, cov_LEE, layer_B[first : first + step], copies_BE[first : first + step], rooms)
        for first in range(0, len(layer_B), step)
    ]
    return np.concatenate(parts)


def _pack(mean_LE: Floats, cov_LEE: Floats, layer_B: Ints, copies_BE: Ints, rooms: Rooms) -> Bools:
    num_tries, num_experts, num_shards = len(layer_B), mean_LE.shape[1], len(rooms.slots_S)
    mean_BE = mean_LE[layer_B] / copies_BE
    has_cov = bool(cov_LEE.any())
    var_BE = cov_LEE.diagonal(axis1=1, axis2=2)[layer_B] / copies_BE**2
    expert_BN = _by_share(mean_BE + Z * np.sqrt(var_BE), copies_BE)
    held_BES = np.zeros((num_tries, num_experts, num_shards), np.bool_)
    used_BS = np.zeros((num_tries, num_shards), np.int64)
    mean_BS, var_BS = np.zeros((num_tries, num_shards)), np.zeros((num_tries, num_shards))
    cov_BSE = np.zeros((num_tries, num_shards, num_experts) if has_cov else (0, 0, 0))
    tries = np.arange(num_tries)
    for expert_B in expert_BN.T:
        share_mean_B = mean_BE[tries, expert_B]
        risk_BS = mean_BS + share_mean_B[:, None]
        if has_cov:
            copies_B = copies_BE[tries, expert_B]
            with_B = cov_BSE[tries, :, expert_B] / copies_B[:, None]
            new_var_BS = np.maximum(var_BS + var_BE[tries, expert_B][:, None] + 2 * with_B, 0.0)
            risk_BS = risk_BS + Z * np.sqrt(new_var_BS)
        holds_BS = held_BES[tries, expert_B]
        is_closed_BS = holds_BS | (used_BS >= rooms.slots_S)
        if rooms.least_nodes > 1:
            on_BM = holds_BS @ rooms.on_node_SM > 0
            needs_node_B = on_BM.sum(axis=1) < rooms.least_nodes
            is_closed_BS |= on_BM[:, rooms.node_S] & needs_node_B[:, None]
        risk_BS[is_closed_BS] = np.inf
        shard_B = risk_BS.argmin(axis=1)
        fits = np.flatnonzero((expert_B >= 0) & np.isfinite(risk_BS[tries, shard_B]))
        expert, shard = expert_B[fits], shard_B[fits]
        held_BES[fits, expert, shard] = True
        used_BS[fits, shard] += 1
        mean_BS[fits, shard] += share_mean_B[fits]
        if has_cov:
            var_BS[fits, shard] = new_var_BS[fits, shard]
            cov_BSE[fits, shard] += cov_LEE[layer_B[fits], expert] / copies_BE[fits, expert][:, None]
    return held_BES


def _by_share(share_BE: Floats, copies_BE: Ints) -> Ints:
    """expert_BN: each expert as often as it has copies, the largest share first, and then -1."""
    order_BE = np.argsort(-share_BE, axis=1, kind="stable")
    expert_BN = np.full((len(copies_BE), int(copies_BE.sum(axis=1).max())), -1, np.int64)
    for expert_N, order_E, copies_E in zip(expert_BN, order_BE, copies_BE, strict=True):
        listed = np.repeat(order_E, copies_E[order_E])
        expert_N[: len(listed)] = listed
    return expert_BN

"""One layer's layout made better by few steps from where it is: swaps, moves, copies more and copies less.

After SwiftBalancer (vllm-ascend, policy_swift_balancer.py), which swaps only.

Legend: E experts, S shards, P the copies of a layout as pairs (expert, shard).
"""

from collections.abc import Iterator

import numpy as np

from cluster.policy.layout import Bools, Floats, Ints, Rooms, load_of_shards, may_leave, may_move

_ROUNDING = 1e-9
CLOSE = 2e-4
"""A largest load so close to the goal needs no further step."""
TARGETS = 32
"""The least loaded shards, which a step may give something to."""

Cells = list[tuple[int, int, bool]]
"""(expert, shard, whether it is held then), for each cell that a step changes."""


def improved(
    held_ES: Bools,
    now_ES: Bools,
    mean_E: Floats,
    rooms: Rooms,
    price: float,
    most_steps: int,
    *,
    goal: float = 1.0,
    may_add: bool = True,
) -> Bools:
    """The best layout on a walk of steps, each of which relieves the most loaded shard most.

    now_ES: what is held; a copy that is not held costs `price` in units of load. Best is the least
    largest load + price * copies to load. The walk ends after most_steps, or once the largest load
    over the mean is `goal`. may_add: whether it may have more copies than held_ES.

    >>> rooms = Rooms(np.array([2, 2]), np.array([0, 0]), replicas=1)
    >>> now = np.array([[True, False], [True, False], [False, True], [False, True]])
    >>> improved(now, now, np.array([4.0, 3, 2, 1]), rooms, 0.0, 9).astype(int).tolist()
    [[0, 1], [1, 0], [1, 0], [0, 1]]
    """
    walk = _Walk(held_ES, mean_E, rooms, may_add)
    moved = int((held_ES & ~now_ES).sum())
    best_ES, best_cost = held_ES, walk.load_S.max() + price * moved
    for _ in range(most_steps):
        cells = None if walk.load_S.max() <= goal * walk.load_S.mean() * (1 + CLOSE) else walk.best_step()
        if cells is None:
            break
        for expert, shard, is_held in cells:
            walk.set(expert, shard, is_held)
            moved += 0 if now_ES[expert, shard] else 1 if is_held else -1
        cost = walk.load_S.max() + price * moved
        if cost < best_cost * (1 - _ROUNDING):
            best_ES, best_cost = walk.held_ES.copy(), cost
    return best_ES


class _Walk:
    """A layout that changes cell by cell, and its loads."""

    def __init__(self, held_ES: Bools, mean_E: Floats, rooms: Rooms, may_add: bool) -> None:
        self.held_ES: Bools = held_ES.copy()
        self.mean_E, self.rooms, self._may_add = mean_E, rooms, may_add
        self._copies_E, self._used_S = held_ES.sum(axis=1), held_ES.sum(axis=0)
        self.load_S = load_of_shards(held_ES, mean_E)

    def set(self, expert: int, shard: int, is_held: bool) -> None:
        """Hold the expert on the shard, or no more."""
        row_S, mean = self.held_ES[expert], self.mean_E[expert]
        self.load_S -= row_S * (mean / max(self._copies_E[expert], 1))
        change = 1 if is_held else -1
        row_S[shard] = is_held
        self._copies_E[expert] += change
        self._used_S[shard] += change
        self.load_S += row_S * (mean / max(self._copies_E[expert], 1))

    def best_step(self) -> Cells | None:
        """The step after which the shards that it is about have the least to do; None if none relieves the peak."""
        peak = int(self.load_S.argmax())
        least, best = float(self.load_S[peak]) * (1 - _ROUNDING), None
        for after, cells in self._steps(peak):
            if after < least:
                least, best = after, cells
        return best

    def _steps(self, peak: int) -> Iterator[tuple[float, Cells]]:
        """The best step of each kind, and the largest load that it leaves on the peak and on whom it gives more."""
        held_ES, load_S, mean_E, copies_E = self.held_ES, self.load_S, self.mean_E, self._copies_E
        is_spread = self.rooms.least_nodes > 1
        ours_I = np.flatnonzero(held_ES[:, peak])
        share_I, more_I = mean_E[ours_I] / copies_E[ours_I], mean_E[ours_I] / (copies_E[ours_I] + 1)
        rest_I = load_S[peak] - share_I
        near_T = np.argsort(load_S)[:TARGETS]
        near_T = near_T[near_T != peak]
        may_come_IT = ~held_ES[np.ix_(ours_I, near_T)]
        may_go_IT = may_come_IT
        if is_spread:
            may_go_IT = may_come_IT & may_move(held_ES, self.rooms, ours_I[:, None], peak, near_T)
        free_T = self._used_S[near_T] < self.rooms.slots_S[near_T]
        if free_T.any():
            after_IT = np.maximum(load_S[near_T] + share_I[:, None], rest_I[:, None])
            for after, i, t in _least(after_IT, may_go_IT & free_T):
                yield after, [(ours_I[i], peak, False), (ours_I[i], near_T[t], True)]
            after_IT = np.maximum(load_S[near_T] + more_I[:, None], (rest_I + more_I)[:, None])
            for after, i, t in _least(after_IT, may_come_IT & free_T & self._may_add):
                yield after, [(ours_I[i], near_T[t], True)]
        theirs_P, t_P = np.nonzero(held_ES[:, near_T])
        shard_P, share_P = near_T[t_P], mean_E[theirs_P] / copies_E[theirs_P]
        without_P = load_S[shard_P] - share_P
        may_swap_P = ~held_ES[theirs_P, peak]
        if is_spread:
            may_swap_P &= may_move(held_ES, self.rooms, theirs_P, shard_P, peak)
        after_IP = np.maximum(without_P + share_I[:, None], rest_I[:, None] + share_P)
        for after, i, p in _least(after_IP, may_go_IT[:, t_P] & may_swap_P):
            theirs, there = theirs_P[p], shard_P[p]
            yield after, [
                (ours_I[i], peak, False), (ours_I[i], there, True), (theirs, there, False), (theirs, peak, True)
            ]  # fmt: skip
        # A copy more of an expert of the peak instead of one of another, whose other holders get more to do.
        spare_P = np.flatnonzero(copies_E[theirs_P] > self.rooms.least_copies)
        if len(spare_P) and is_spread:
            spare_P = spare_P[may_leave(held_ES, self.rooms)[theirs_P[spare_P], shard_P[spare_P]]]
        if len(spare_P):
            theirs_P, t_P, shard_P, without_P = theirs_P[spare_P], t_P[spare_P], shard_P[spare_P], without_P[spare_P]
            extra_P = mean_E[theirs_P] / (copies_E[theirs_P] - 1) - share_P[spare_P]
            peak_IP = (rest_I + more_I)[:, None] + np.where(held_ES[theirs_P, peak], extra_P, 0.0)
            others_P = self._largest_other(peak, theirs_P, shard_P) + extra_P
            after_IP = np.maximum(np.maximum(without_P + more_I[:, None], peak_IP), others_P)
            for after, i, p in _least(after_IP, may_come_IT[:, t_P] & (theirs_P != ours_I[:, None])):
                yield after, [(theirs_P[p], shard_P[p], False), (ours_I[i], shard_P[p], True)]

    def _largest_other(self, peak: int, expert_P: Ints, shard_P: Ints) -> Floats:
        """For each pair, the largest load among the expert's other holders, but the peak; -inf if there is none."""
        experts_X, x_P = np.unique(expert_P, return_inverse=True)
        load_XS = np.where(self.held_ES[experts_X], self.load_S, -np.inf)
        load_XS[:, peak] = -np.inf
        rows = np.arange(len(experts_X))
        first_X = load_XS.argmax(axis=1)
        most_X = load_XS[rows, first_X]
        load_XS[rows, first_X] = -np.inf
        largest_P: Floats = np.where(first_X[x_P] == shard_P, load_XS.max(axis=1)[x_P], most_X[x_P])
        return largest_P


def _least(after_XY: Floats, may_XY: Bools) -> Iterator[tuple[float, int, int]]:
    """The smallest allowed value with its indices, if any is allowed."""
    allowed_XY = np.where(may_XY, after_XY, np.inf)
    if allowed_XY.size:
        x, y = divmod(int(allowed_XY.argmin()), allowed_XY.shape[1])
        if np.isfinite(allowed_XY[x, y]):
            yield float(allowed_XY[x, y]), x, y


def shed(held_ES: Bools, now_ES: Bools, mean_E: Floats, rooms: Rooms, goal: float) -> Bools:
    """The layout without copies that nobody needs: the largest load stays, or is at most `goal` times the mean.

    Copies that had to be loaded first go first, then those that bring least.

    >>> rooms = Rooms(np.array([2, 2]), np.array([0, 0]), replicas=1)
    >>> held = np.array([[True, True], [True, False], [False, True]])
    >>> shed(held, held, np.array([0.0, 1, 1]), rooms, 1.0).astype(int).tolist()
    [[0, 1], [1, 0], [0, 1]]
    """
    walk = _Walk(held_ES, mean_E, rooms, may_add=False)
    limit = max(float(walk.load_S.max()), goal * float(walk.load_S.mean())) * (1 + _ROUNDING)
    while _drop_one_by_one(walk, now_ES, limit):
        pass
    return walk.held_ES


def _drop_one_by_one(walk: _Walk, now_ES: Bools, limit: float) -> bool:
    """Let go of every copy after which no shard has more than `limit` to do; whether there was any."""
    experts_P, shards_P = np.nonzero(may_leave(walk.held_ES, walk.rooms))
    mean_E, load_S = walk.mean_E, walk.load_S.copy()
    pairs = sorted(
        zip(experts_P.tolist(), shards_P.tolist(), strict=True),
        key=lambda pair: (bool(now_ES[pair]), mean_E[pair[0]], -load_S[pair[1]]),
    )
    dropped = False
    for expert, shard in pairs:
        if may_leave(walk.held_ES[expert : expert + 1], walk.rooms)[0, shard]:
            walk.set(expert, shard, False)
            if walk.load_S.max() <= limit:
                dropped = True
            else:
                walk.set(expert, shard, True)
    return dropped

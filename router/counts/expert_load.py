"""How many tokens each expert gets: counted by the dispatcher, told in a few numbers.

Legend: L MoE layers, E experts.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from experts.placement import Placement

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

# "Recent" is the last minute: what an expert got t seconds ago counts exp(-t / WINDOW_S), so that at a steady rate the
# sum is what it gets in WINDOW_S.
WINDOW_S = 60.0
# Counts are folded into the window so often; what arrives between two folds is taken to be equally old.
FOLD_S = 1.0
HOTTEST = 10
# More than a model has; so that steps that nobody ends do not pile up.
MAX_LAYERS = 1024
# Upper bounds of an expert's load over the mean of its layer; 1 is a balanced expert.
RATIO_BOUNDS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)


@dataclass(frozen=True)
class HotExpert:
    """recent_tokens: see WINDOW_S."""

    layer: int
    expert: int
    recent_tokens: float


@dataclass(frozen=True)
class ExpertLoadSummary:
    """All experts of all layers in a number of figures that does not grow with them.

    hottest: at most HOTTEST. ratio_counts: how many (layer, expert) have a load, relative to the mean of their layer,
    of at most each of RATIO_BOUNDS and above the one before; the last counts those above all. ratio_sum: of all
    ratios. balance_worst, balance_mean: mean load over largest load of a layer, the smallest of all layers and their
    mean; 1 is even, 1 / E is everything on one expert.
    """

    hottest: tuple[HotExpert, ...]
    ratio_counts: tuple[int, ...]
    ratio_sum: float
    balance_worst: float
    balance_mean: float


class ExpertLoad:
    """Tokens by (layer, expert), and rows by shard, since the start and recently.

    `start_step`, `count` and `end_step` belong to the engine's thread, everything else to any one thread; each number
    is right by itself.
    """

    def __init__(self, placement: Placement, clock: Callable[[], float] = time.monotonic) -> None:
        self.layers = tuple(placement.shards_of)
        self.rows_of_shard = [0] * placement.num_shards
        """(token, expert) pairs sent to each shard since the start, also by steps that failed."""
        self._clock = clock
        num_experts = max((len(by_expert) for by_expert in placement.shards_of.values()), default=0)
        self.tokens_LE: Counts = np.zeros((len(self.layers), num_experts), dtype=np.int64)
        """Since the start."""
        self._tokens_of = {layer: self.tokens_LE[row] for row, layer in enumerate(self.layers)}
        self._step: deque[tuple[int, Counts, Counts]] = deque(maxlen=MAX_LAYERS)
        # Counts are taken in after the step, in one go: amid it, each would take 5 us to come back into the caches.
        self.count: Callable[[tuple[int, Counts, Counts]], None] = self._step.append
        """count((layer, tokens, place_E)): a step's tokens for each expert; expert e's are at tokens[place_E[e]]."""
        self._counted_s = clock()
        # (when, what was recent then, the tokens that it includes), replaced as one.
        self._folded = (clock(), np.zeros(self.tokens_LE.shape), self.tokens_LE.copy())
        self._hot: tuple[int, ...] = ()
        self._hot_since_s = -math.inf

    def start_step(self) -> None:
        """A step begins. What an earlier one has counted that failed, and so had no `end_step`, is dropped."""
        self._step.clear()

    def end_step(self) -> None:
        """Take in what the step has counted; called after each that did not fail, by the thread that counts."""
        for layer, tokens, place_E in self._step:
            counted_E = self._tokens_of[layer]
            counted_E += tokens[place_E]
        self._step.clear()
        self._counted_s = now_s = self._clock()
        if now_s - self._folded[0] >= FOLD_S:
            tokens_LE = self.tokens_LE.copy()
            self._folded = (now_s, self._recent(now_s, tokens_LE), tokens_LE)

    def summary(self) -> ExpertLoadSummary | None:
        """The recent load; None if there was none. Call it from one thread only: it remembers who was hot."""
        now_s = self._clock()
        recent_LE = self._recent(now_s, self.tokens_LE)
        if recent_LE.sum() < 1.0:
            return None
        # A label once shown is a time series for ever, so at most HOTTEST new ones may come per window.
        if now_s - self._hot_since_s >= WINDOW_S:
            self._hot = hottest(recent_LE.ravel(), self._hot, HOTTEST)
            self._hot_since_s = now_s
        ratio_LE = load_ratio(recent_LE)
        at = np.searchsorted(RATIO_BOUNDS, ratio_LE.ravel(), side="left")
        balance_L = balance(recent_LE)
        return ExpertLoadSummary(
            tuple(sorted((self._hot_expert(place, recent_LE) for place in self._hot), key=lambda h: -h.recent_tokens)),
            tuple(np.bincount(at, minlength=len(RATIO_BOUNDS) + 1).tolist()),
            float(ratio_LE.sum()),
            float(balance_L.min()),
            float(balance_L.mean()),
        )

    def _recent(self, now_s: float, tokens_LE: Counts) -> Floats:
        then_s, recent_LE, included_LE = self._folded
        last_s = max(self._counted_s, then_s)  # nothing has come since
        return decayed(decayed(recent_LE, tokens_LE - included_LE, last_s - then_s), 0, now_s - last_s)

    def _hot_expert(self, place: int, recent_LE: Floats) -> HotExpert:
        row, expert = divmod(place, recent_LE.shape[1])
        return HotExpert(self.layers[row], expert, float(recent_LE[row, expert]))


def decayed(recent: Floats, added: Counts | int, elapsed_s: float) -> Floats:
    """The window `elapsed_s` later, when `added` has just come: after 60 s without any, 100 has become 100 / e = 37."""
    return recent * math.exp(-elapsed_s / WINDOW_S) + added


def hottest(recent: Floats, shown: Sequence[int], count: int) -> tuple[int, ...]:
    """Which of the flat `recent` to show, at most `count` of those above 0: the hottest, but who is shown stays while
    it is among the hottest 2 * count, so that equals do not take turns.

    Example: of (5, 9, 8, 7) with count 1, the second is shown; if the third was, it still is.
    """
    ranked = [int(place) for place in np.argsort(-recent, kind="stable")[: 2 * count] if recent[place] > 0]
    stay = [place for place in shown if place in ranked]
    return tuple(stay + [place for place in ranked if place not in stay][: count - len(stay)])


def load_ratio(recent_LE: Floats) -> Floats:
    """Each load over the mean of its layer; a layer without any is left out."""
    used_LE = recent_LE[recent_LE.sum(axis=1) > 0]
    ratio_LE: Floats = used_LE / used_LE.mean(axis=1, keepdims=True)
    return ratio_LE


def balance(recent_LE: Floats) -> Floats:
    """Mean over maximum of each layer that has any load: (3, 1, 0, 0) is 1 / 3."""
    used_LE = recent_LE[recent_LE.sum(axis=1) > 0]
    balance_L: Floats = used_LE.mean(axis=1) / used_LE.max(axis=1)
    return balance_L

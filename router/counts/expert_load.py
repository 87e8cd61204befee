"""How many tokens each expert gets: counted by the dispatcher, summarised in a few numbers.

Legend: L MoE layers, E experts.
"""

import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from experts.placement import Placement
from router.counts.expert_totals import Counts, ExpertTotals

Floats = npt.NDArray[np.float64]

# "Recent" is an exponential window: tokens from t seconds ago count exp(-t / WINDOW_S). At a
# steady rate the sum is what an expert gets in WINDOW_S.
WINDOW_S = 60.0
# Counts are added to the window this often. All that arrive in between count as equally old.
FOLD_S = 1.0
HOTTEST = 10
# More than any model has. It bounds memory if `end_step` is never called.
MAX_LAYERS = 1024
# Upper bounds of an expert's load over the mean of its layer; 1 is a balanced expert.
RATIO_BOUNDS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)


@dataclass(frozen=True)
class HotExpert:
    """An expert with high load. recent_tokens: see WINDOW_S."""

    layer: int
    expert: int
    recent_tokens: float


@dataclass(frozen=True)
class ExpertLoadSummary:
    """The load of all experts of all layers, in a fixed number of figures.

    hottest: at most HOTTEST experts.
    ratio_counts: a histogram with RATIO_BOUNDS. It counts (layer, expert) by load over the mean
    load of the layer.
    ratio_sum: the sum of these ratios.
    balance_worst, balance_mean: minimum and mean over layers of mean load / largest load. 1 is
    even; 1 / E is everything on one expert.
    """

    hottest: tuple[HotExpert, ...]
    ratio_counts: tuple[int, ...]
    ratio_sum: float
    balance_worst: float
    balance_mean: float


class ExpertLoad:
    """Tokens by (layer, expert): totals and recent load.

    `start_step`, `count` and `end_step` are for the engine's thread, everything else is for any
    one thread. Each number is right by itself.
    """

    def __init__(self, placement: Placement, clock: Callable[[], float] = time.monotonic) -> None:
        self._incarnation = secrets.token_hex(8)
        self.layers = tuple(placement.shards_of)
        self._clock = clock
        num_experts = max((len(by_expert) for by_expert in placement.shards_of.values()), default=0)
        self.tokens_LE: Counts = np.zeros((len(self.layers), num_experts), dtype=np.int64)
        """Since the start."""
        self.reads_LE: Counts = np.zeros_like(self.tokens_LE)
        """Steps in which the expert had tokens, since the start."""
        self._index_of = {layer: index for index, layer in enumerate(self.layers)}
        self._step: deque[tuple[int, Counts]] = deque(maxlen=MAX_LAYERS)
        # A bare deque.append: counts are added after the step. Within it, each addition takes 5 us
        # with cold caches.
        self.count: Callable[[tuple[int, Counts]], None] = self._step.append
        """count((layer, tokens_E)): a step's tokens by expert."""
        self._counted_s = clock()
        # (time, recent load at that time, totals included in it), replaced as one object.
        self._folded = (clock(), np.zeros(self.tokens_LE.shape), self.tokens_LE.copy())
        self._hot: tuple[int, ...] = ()
        self._hot_since_s = -math.inf

    def start_step(self) -> None:
        """Begin a step. Counts of a failed step, which had no `end_step`, are dropped."""
        self._step.clear()

    def end_step(self) -> None:
        """Add the step's counts to the totals.

        Called after each step that did not fail, by the thread that counts.
        """
        for layer, tokens_E in self._step:
            index = self._index_of[layer]
            self.tokens_LE[index] += tokens_E
            self.reads_LE[index] += tokens_E > 0
        self._step.clear()
        self._counted_s = now_s = self._clock()
        if now_s - self._folded[0] >= FOLD_S:
            tokens_LE = self.tokens_LE.copy()
            self._folded = (now_s, self._recent(now_s, tokens_LE), tokens_LE)

    def totals(self) -> ExpertTotals:
        """What was counted since the start, as a copy."""
        return ExpertTotals(self._incarnation, self.tokens_LE.copy(), self.reads_LE.copy())

    def summary(self) -> ExpertLoadSummary | None:
        """The recent load, or None if there was none.

        For one thread only: it remembers which experts were hot.
        """
        now_s = self._clock()
        recent_LE = self._recent(now_s, self.tokens_LE)
        if recent_LE.sum() < 1.0:
            return None
        # Each label ever shown is one more time series, so at most HOTTEST new ones are shown per
        # window.
        if now_s - self._hot_since_s >= WINDOW_S:
            self._hot = hottest(recent_LE.ravel(), self._hot, HOTTEST)
            self._hot_since_s = now_s
        ratio_LE = load_ratio(recent_LE)
        at = np.searchsorted(RATIO_BOUNDS, ratio_LE.ravel(), side="left")
        balance_L = balance(recent_LE)
        return ExpertLoadSummary(
            tuple(sorted((self._hot_expert(index, recent_LE) for index in self._hot), key=lambda h: -h.recent_tokens)),
            tuple(np.bincount(at, minlength=len(RATIO_BOUNDS) + 1).tolist()),
            float(ratio_LE.sum()),
            float(balance_L.min()),
            float(balance_L.mean()),
        )

    def _recent(self, now_s: float, tokens_LE: Counts) -> Floats:
        then_s, recent_LE, included_LE = self._folded
        last_s = max(self._counted_s, then_s)  # of the newest counts
        return decayed(decayed(recent_LE, tokens_LE - included_LE, last_s - then_s), 0, now_s - last_s)

    def _hot_expert(self, flat_index: int, recent_LE: Floats) -> HotExpert:
        index, expert = divmod(flat_index, recent_LE.shape[1])
        return HotExpert(self.layers[index], expert, float(recent_LE[index, expert]))


def decayed(recent: Floats, added: Counts | int, elapsed_s: float) -> Floats:
    """The window after elapsed_s more seconds, plus `added`.

    Example: after 60 s, 100 has become 100 / e = 37.
    """
    return recent * math.exp(-elapsed_s / WINDOW_S) + added


def hottest(recent: Floats, shown: Sequence[int], count: int) -> tuple[int, ...]:
    """Indices of up to `count` nonzero loads to show, with hysteresis, so that near-equals do not alternate.

    An index in `shown` stays while it ranks in the top 2 * count; the rest are the highest loads.

    recent: loads, flat. Example: of (5, 9, 8, 7) with count 1, index 1 is shown. If index 2 was
    shown, it stays.
    """
    ranked = [int(index) for index in np.argsort(-recent, kind="stable")[: 2 * count] if recent[index] > 0]
    stay = [index for index in shown if index in ranked]
    return tuple(stay + [index for index in ranked if index not in stay][: count - len(stay)])


def load_ratio(recent_LE: Floats) -> Floats:
    """Each load over the mean of its layer. Layers without load are left out."""
    used_LE = recent_LE[recent_LE.sum(axis=1) > 0]
    ratio_LE: Floats = used_LE / used_LE.mean(axis=1, keepdims=True)
    return ratio_LE


def balance(recent_LE: Floats) -> Floats:
    """Mean load over largest load, for each layer with load. Example: (3, 1, 0, 0) gives 1 / 3."""
    used_LE = recent_LE[recent_LE.sum(axis=1) > 0]
    balance_L: Floats = used_LE.mean(axis=1) / used_LE.max(axis=1)
    return balance_L

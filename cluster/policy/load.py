"""What each expert costs, as measured: windows of work per second, from the totals that routers count.

Legend: W windows, L MoE layers, E experts.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from router.counts.expert_totals import ExpertTotals
from router.model.replica_choice import ROWS_PER_EXPERT

Floats = npt.NDArray[np.float64]

MAX_ROWS = 64


@dataclass(frozen=True)
class Loads:
    """Work per second of each expert in some windows of equal length.

    layers: indices in the model. rows_WLE: rows' worth per second. An expert's rows count 1 each,
    and each step that has any of them counts ROWS_PER_EXPERT: reading the weights takes as long as
    computing so many rows. What is balanced is thus the shards' time, not their tokens.

    >>> loads = Loads((0,), np.array([[[2.0, 0.0]], [[4.0, 0.0]]]))
    >>> loads.mean_LE.tolist(), loads.var_LE.tolist()
    ([[3.0, 0.0]], [[1.0, 0.0]])
    """

    layers: tuple[int, ...]
    rows_WLE: Floats

    @property
    def mean_LE(self) -> Floats:
        mean_LE: Floats = self.rows_WLE.mean(axis=0)
        return mean_LE

    @property
    def var_LE(self) -> Floats:
        var_LE: Floats = self.rows_WLE.var(axis=0)
        return var_LE


class LoadWindow:
    """The last windows of all routers together. Whoever samples gives the time; one thread."""

    def __init__(self, layers: Sequence[int], num_experts: int, max_rows: int = MAX_ROWS) -> None:
        self._layers, self._shape = tuple(layers), (len(layers), num_experts)
        self._rows: deque[tuple[float, Floats]] = deque(maxlen=max_rows)
        self._last: dict[str, tuple[float, ExpertTotals]] = {}

    def add(self, time_s: float, totals: Mapping[str, ExpertTotals]) -> bool:
        """Note what the routers that answered have counted since they started; whether that made a window.

        Each router's work is taken since its own last sample. A router that was started again since
        counts from 0. One that is seen for the first time only shows where its counting stands.
        """
        rates = []
        for router, now in totals.items():
            if router in self._last:
                then_s, then = self._last[router]
                work_LE = _work(now)
                if now.incarnation == then.incarnation:
                    work_LE = work_LE - _work(then)
                rates.append(work_LE / max(time_s - then_s, 1e-9))
            self._last[router] = time_s, now
        if rates:
            self._rows.append((time_s, np.sum(rates, axis=0)))
        return bool(rates)

    def age_s(self, now_s: float) -> float | None:
        """Seconds since the last window; None if there is none."""
        return now_s - self._rows[-1][0] if self._rows else None

    def loads(self, now_s: float, over_s: float) -> Loads | None:
        """The windows of the last `over_s` seconds; None if there are none, or nothing was computed in them."""
        rows = [row_LE for time_s, row_LE in self._rows if time_s > now_s - over_s]
        if not any(row_LE.any() for row_LE in rows):
            return None
        return Loads(self._layers, np.array(rows).reshape(-1, *self._shape))


def _work(totals: ExpertTotals) -> Floats:
    """Rows' worth of what was counted. Example: 8 rows in 2 steps are 8 + 2 * 16 = 40."""
    work_LE: Floats = totals.tokens_LE + totals.reads_LE * ROWS_PER_EXPERT
    return work_LE

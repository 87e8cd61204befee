"""What a simulation writes down: a row per sample, and totals.

Legend: L MoE layers, S shards.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cluster.simulation.route_table import ShardWork
from cluster.simulation.router import Told
from experts.placement import Placement


@dataclass(frozen=True)
class Row:
    """What happened since the row before.

    time_s: when it ends. gap_ms_*, first_ms_*: between a stream's tokens, and to its first; None
    without any. imbalance: rows of the busiest shard over the mean, averaged over layers; None
    without rows. copies: holders of an expert, on average. moved_bytes: read into shards since the
    start. running, waiting: requests now.
    """

    time_s: float
    tok_s: float
    gap_ms_p50: float | None
    gap_ms_p99: float | None
    gap_ms_max: float | None
    first_ms_p50: float | None
    imbalance: float | None
    copies: float
    shards: int
    routers: int
    running: int
    waiting: int
    moved_bytes: int


def imbalance(rows_LS: np.ndarray, shards: Sequence[int]) -> float | None:
    """max / mean of rows over these shards in each layer, averaged over the layers that have any.

    >>> imbalance(np.array([[30, 10, 0], [20, 20, 0]]), [0, 1])
    1.25
    """
    used_LS = rows_LS[:, list(shards)]
    used_LS = used_LS[used_LS.sum(axis=1) > 0]
    return float((used_LS.max(axis=1) / used_LS.mean(axis=1)).mean()) if used_LS.size else None


def copies(placement: Placement) -> float:
    """Holders of an expert, on average; 0 for a dense model."""
    counts = [len(shards) for by_expert in placement.shards_of.values() for shards in by_expert]
    return sum(counts) / len(counts) if counts else 0.0


def holders(placement: Placement) -> list[int]:
    """The shards that hold any expert."""
    return sorted({shard for by_expert in placement.shards_of.values() for shards in by_expert for shard in shards})


class Recorder:
    """Fed with every step."""

    def __init__(self, layers: int, num_shards: int) -> None:
        self.rows: list[Row] = []
        self._rows_LS = np.zeros((layers, num_shards), np.int64)
        self._all_LS = np.zeros((layers, num_shards), np.int64)
        self._gaps_s: list[float] = []
        self._firsts_s: list[float] = []
        self._all_gaps_s: list[np.ndarray] = []
        self._all_firsts_s: list[np.ndarray] = []
        self._tokens = self._sampled_tokens = 0
        self._sampled_s = 0.0
        self.finished = 0

    @property
    def rows_computed(self) -> int:
        """Rows of all steps, layers and shards that have been sampled."""
        return int(self._all_LS.sum())

    def step(self, told: Sequence[Told], work: ShardWork) -> None:
        for token in told:
            (self._firsts_s if token.is_first else self._gaps_s).append(token.gap_s)
            self.finished += token.is_last
        self._tokens += len(told)
        self._rows_LS += work.rows_LS

    def sample(self, now_s: float, placement: Placement, **counts: int) -> None:
        """End a row. counts: the row's fields that others know."""
        gaps_ms, firsts_ms = (1e3 * np.array(seconds) for seconds in (self._gaps_s, self._firsts_s))
        seconds = now_s - self._sampled_s
        row = Row(
            time_s=round(now_s, 3),
            tok_s=(self._tokens - self._sampled_tokens) / seconds if seconds > 0 else 0.0,
            gap_ms_p50=_percentile(gaps_ms, 50),
            gap_ms_p99=_percentile(gaps_ms, 99),
            gap_ms_max=_percentile(gaps_ms, 100),
            first_ms_p50=_percentile(firsts_ms, 50),
            imbalance=imbalance(self._rows_LS, holders(placement)),
            copies=copies(placement),
            **counts,
        )
        self.rows.append(row)
        self._all_gaps_s.append(gaps_ms)
        self._all_firsts_s.append(firsts_ms)
        self._all_LS += self._rows_LS
        self._rows_LS[:] = 0
        self._gaps_s, self._firsts_s = [], []
        self._sampled_s, self._sampled_tokens = now_s, self._tokens

    def summary(self, placement: Placement) -> dict[str, Any]:
        """Over the whole run."""
        gaps_ms, firsts_ms = (np.concatenate(parts) for parts in (self._all_gaps_s, self._all_firsts_s))
        return {
            "tokens": self._tokens,
            "tok_s": self._tokens / self._sampled_s if self._sampled_s else 0.0,
            "gap_ms_p50": _percentile(gaps_ms, 50),
            "gap_ms_p99": _percentile(gaps_ms, 99),
            "gap_ms_max": _percentile(gaps_ms, 100),
            "first_ms_p50": _percentile(firsts_ms, 50),
            "first_ms_p99": _percentile(firsts_ms, 99),
            "imbalance": imbalance(self._all_LS, holders(placement)),
            "copies": copies(placement),
        }

    def series(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.rows]


def _percentile(values: np.ndarray, q: float) -> float | None:
    return float(np.percentile(values, q)) if len(values) else None

"""What a deployment has counted, as one page for Prometheus.

What is on it is in frontend/metrics/catalogue.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeHistogramMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from frontend.metrics.catalogue import (
    COUNTERS,
    EXPERT_LOAD_RATIO,
    GAUGES,
    HISTOGRAMS,
    ROWS_COMPUTED,
    UP,
    RouterReport,
)
from router.counts.expert_load import RATIO_BOUNDS

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class ShardReport:
    """rows_computed: None if the shard did not answer, or has not loaded its experts."""

    name: str
    rows_computed: int | None


def render(model_name: str, routers: Sequence[RouterReport], shards: Sequence[ShardReport]) -> bytes:
    """The page, in Prometheus' text format; a part that is away has its `drover_up` at 0 and
    nothing else."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Deployment(model_name, routers, shards))
    return generate_latest(registry)


class _Deployment(Collector):
    def __init__(self, model_name: str, routers: Sequence[RouterReport], shards: Sequence[ShardReport]) -> None:
        self._model_name, self._routers, self._shards = model_name, routers, shards

    def collect(self) -> Iterator[Metric]:
        yield from self._parts()
        labels = ["model_name", "router"]
        alive = [(r, [self._model_name, r.name], r.snapshot) for r in self._routers if r.snapshot is not None]
        for kind, catalogue in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for family in catalogue:
                metric = kind(family.name, family.help, labels=[*labels, *family.labels])
                for report, own, snapshot in alive:
                    for values, number in family.samples(report, snapshot):
                        metric.add_metric([*own, *values], number)
                yield metric
        for distribution in HISTOGRAMS:
            histograms = HistogramMetricFamily(distribution.name, distribution.help, labels=labels)
            for _, own, snapshot in alive:
                histogram = distribution.histogram(snapshot)
                histograms.add_metric(own, _buckets(histogram.bounds, histogram.counts), histogram.sum)
            yield histograms
        ratios = GaugeHistogramMetricFamily(*EXPERT_LOAD_RATIO, labels=labels)
        for _, own, snapshot in alive:
            if snapshot.expert_load is not None:
                load = snapshot.expert_load
                ratios.add_metric(own, _buckets(RATIO_BOUNDS, load.ratio_counts), load.ratio_sum)
        yield ratios

    def _parts(self) -> Iterator[Metric]:
        up = GaugeMetricFamily(*UP, labels=["model_name", "part"])
        for router in self._routers:
            up.add_metric([self._model_name, router.name], float(router.snapshot is not None))
        rows = CounterMetricFamily(*ROWS_COMPUTED, labels=["model_name", "shard"])
        for shard in self._shards:
            up.add_metric([self._model_name, shard.name], float(shard.rows_computed is not None))
            if shard.rows_computed is not None:
                rows.add_metric([self._model_name, shard.name], shard.rows_computed)
        yield up
        yield rows


def _buckets(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    return list(zip([*map(floatToGoString, bounds), "+Inf"], accumulate(counts), strict=True))

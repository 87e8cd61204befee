"""The deployment's metrics, read again and again beside a run: is every part well, and what has risen."""

import re
import threading
import time
import urllib.request
from collections.abc import Mapping
from typing import NamedTuple

READ_S = 0.25
TIMEOUT_S = 8.0
RECOVERY = re.compile(r"drover_(dispatch_retries|shard_down|requests_replayed|requests_resumed|link_)\w*_total")
"""Counters that rise only because something was recovered from."""
_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? ([0-9.e+-]+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


class Sample(NamedTuple):
    """One number of a page. labels: without model_name."""

    name: str
    labels: Mapping[str, str]
    value: float


def samples(page: str) -> list[Sample]:
    """The numbers of a page in Prometheus' text format."""
    found = []
    for name, labels, value in _SAMPLE.findall(page):
        by_name = {key: text for key, text in _LABEL.findall(labels) if key != "model_name"}
        found.append(Sample(name, by_name, float(value)))
    return found


def unwell(found: list[Sample]) -> list[str]:
    """Parts that are down, and links: those that a page says are not up."""
    down = [sample.labels.get("part", "?") for sample in found if sample.name == "drover_up" and sample.value == 0]
    unlinked = [
        f"{sample.labels.get('router', '?')} - {sample.labels.get('shard', '?')}"
        for sample in found
        if sample.name == "drover_shard_linked" and sample.value == 0
    ]
    return down + unlinked if found else ["no metrics"]


def recovery(found: list[Sample]) -> dict[str, float]:
    """Recovery counters, over all routers, by name and reason."""
    sums: dict[str, float] = {}
    for sample in found:
        if RECOVERY.fullmatch(sample.name):
            short = sample.name.removeprefix("drover_").removesuffix("_total")
            name = " ".join([short, *(f"({sample.labels[key]})" for key in ("reason",) if key in sample.labels)])
            sums[name] = sums.get(name, 0.0) + sample.value
    return sums


class Rises:
    """How much counters have risen, although processes that count from 0 again take the place of others."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self.total: dict[str, float] = {}

    def see(self, sums: Mapping[str, float]) -> None:
        for name, value in sums.items():
            before = self._last.get(name, 0.0)
            self.total[name] = self.total.get(name, 0.0) + (value - before if value >= before else value)
        self._last.update(sums)


class Watch:
    """Reads the page every READ_S in a thread of its own."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._rises = Rises()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self.well_s = 0.0
        """When a page last said that every part is up; time.monotonic."""
        self.unwell: list[str] = ["not read yet"]
        self.parts: frozenset[str] = frozenset()
        """The routers and shards that the last page named: those that are wanted."""
        self.relinked = 0
        """How often a link was down in one page, and up in the next."""
        self._down: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def rises(self) -> dict[str, float]:
        """Of each recovery counter, since the watch began."""
        with self._lock:
            return dict(self._rises.total) | {"link formed anew": float(self.relinked)}

    def close(self) -> None:
        self._stopped.set()
        self._thread.join(TIMEOUT_S)

    def _run(self) -> None:
        while not self._stopped.wait(READ_S):
            began_s = time.monotonic()
            try:
                with urllib.request.urlopen(self._url, timeout=TIMEOUT_S) as reply:
                    found = samples(reply.read().decode())
            except (OSError, ValueError) as error:
                self.unwell = [f"no metrics: {error}"]
                continue
            self._see(found, began_s)

    def _see(self, found: list[Sample], began_s: float) -> None:
        unwell_now = unwell(found)
        down = {name for name in unwell_now if " - " in name}
        with self._lock:
            self._rises.see(recovery(found))
            self.relinked += len(self._down - down)
            self._down = down
        self.unwell = unwell_now
        self.parts = frozenset(sample.labels["part"] for sample in found if sample.name == "drover_up")
        if not unwell_now:
            self.well_s = began_s

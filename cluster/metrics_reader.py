"""Asks a deployment's actors what they have counted, for one page of metrics."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray

from cluster.part_directory import PartDirectory
from cluster.part_names import part_number
from cluster.reports import RouterMetrics
from frontend.metrics.catalogue import RouterReport
from frontend.metrics.page import ShardReport, render

# Prometheus waits 10 s for a page by default.
TIMEOUT_S = 3.0
# Ray itself has no deadline for telling where an actor is.
RAY_TIMEOUT_S = 6.0


class MetricsReader:
    """Reads a deployment's page for any number of scrapes; lives on one event loop.

    One reading is under way at a time, in a thread of its own, and all scrapes that come meanwhile
    get its page. While Ray's head is away a reading takes minutes. Scrapes that gave up then leave
    nothing behind, above all no busy thread among those that tokenize.
    """

    def __init__(
        self, read: Callable[[], bytes], page_without_answers: Callable[[], bytes], timeout_s: float = RAY_TIMEOUT_S
    ) -> None:
        """read: blocks until the page is read. page_without_answers: for a scrape that waited timeout_s."""
        self._read = read
        self._page_without_answers = page_without_answers
        self._timeout_s = timeout_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self._reading: asyncio.Future[bytes] | None = None

    async def page(self) -> bytes:
        """A page that was read after this was asked for, or while; takes timeout_s at most."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.get_running_loop().run_in_executor(self._thread, self._read)
        reading = self._reading
        await asyncio.wait([reading], timeout=self._timeout_s)
        if reading.done():
            return reading.result()
        return _comment(f"Ray did not answer within {self._timeout_s:g} s") + self._page_without_answers()


def deployment_reader(model_name: str, directory: PartDirectory, namespace: str) -> MetricsReader:
    """A reader of the page of a deployment's routers and shards: those that are wanted when it is read."""

    def page_without_answers() -> bytes:
        names = directory.shards
        routers = [RouterReport(name, None, _by_number(names)) for name in directory.routers]
        return render(model_name, routers, [ShardReport(name, None) for name in names])

    return MetricsReader(
        lambda: read_page(model_name, directory.routers, directory.shards, namespace), page_without_answers
    )


def read_page(
    model_name: str,
    router_names: Sequence[str],
    shard_names: Sequence[str],
    namespace: str,
    timeout_s: float = TIMEOUT_S,
) -> bytes:
    """The page.

    If a router is not on it, its first lines say why. Takes about timeout_s at most, whoever is
    down.
    """
    answers = _ask(
        [*((name, "metrics") for name in router_names), *((name, "stats") for name in shard_names)],
        namespace,
        timeout_s,
    )
    routers, remarks, numbered = [], [], _by_number(shard_names)
    for name in router_names:
        counted: RouterMetrics | None = answers.get(name)
        if counted is None:
            remarks.append(f"{name} did not answer within {timeout_s:g} s")
            routers.append(RouterReport(name, None, numbered))
            continue
        if counted.engine is None:
            remarks.append(f"{name} has not loaded its model yet")
        routers.append(
            RouterReport(
                name,
                counted.engine,
                numbered,
                frozenset(counted.down),
                counted.losses,
                counted.missing_experts,
                counted.is_degraded,
            )
        )
    # A shard that has not loaded yet answers, and holds no expert.
    held = {name: answers[name] for name in shard_names if name in answers and answers[name].experts_held}
    shards = [ShardReport(name, held[name].rows_computed if name in held else None) for name in shard_names]
    return b"".join(map(_comment, remarks)) + render(model_name, routers, shards)


def _by_number(shard_names: Sequence[str]) -> dict[int, str]:
    return {part_number(name): name for name in shard_names}


def _comment(text: str) -> bytes:
    return f"# {text}\n".encode()


def _ask(calls: Sequence[tuple[str, str]], namespace: str, timeout_s: float) -> dict[str, Any]:
    """What each actor's method returned, by the actor's name.

    Actors that fail or are late are left out.
    """
    deadline_s = time.monotonic() + timeout_s
    asked = {}
    for name, method in calls:
        try:
            asked[name] = getattr(ray.get_actor(name, namespace=namespace), method).remote()
        except (ValueError, ray.exceptions.RayError):
            continue  # no such actor now
    if not asked:
        return {}
    ready, late = ray.wait(
        list(asked.values()), num_returns=len(asked), timeout=max(0.0, deadline_s - time.monotonic())
    )
    for answer in late:
        ray.cancel(answer)
    answers = {}
    for name, answer in asked.items():
        if answer in ready:
            try:
                answers[name] = ray.get(answer)
            except ray.exceptions.RayError:
                continue  # it died, or is being restarted
    return answers

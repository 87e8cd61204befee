"""Asks a deployment's actors what they have counted, for one page of metrics."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import ray

from cluster.reports import RouterMetrics
from frontend.metrics.catalogue import RouterReport
from frontend.metrics.page import ShardReport, render

# Prometheus waits 10 s for a page by default.
TIMEOUT_S = 3.0
# Ray itself has no deadline for telling where an actor is.
RAY_TIMEOUT_S = 6.0


async def page_in_time(model_name: str, router_name: str, shard_names: Sequence[str], namespace: str) -> bytes:
    """`read_page` without blocking the event loop, and within RAY_TIMEOUT_S even if Ray's head is
    away."""
    reading = asyncio.to_thread(read_page, model_name, router_name, shard_names, namespace)
    try:
        return await asyncio.wait_for(reading, RAY_TIMEOUT_S)
    except asyncio.TimeoutError:
        nobody = [ShardReport(name, None) for name in shard_names]
        page = render(model_name, [RouterReport(router_name, None, shard_names)], nobody)
        return _comment(f"Ray did not answer within {RAY_TIMEOUT_S:g} s") + page


def read_page(
    model_name: str, router_name: str, shard_names: Sequence[str], namespace: str, timeout_s: float = TIMEOUT_S
) -> bytes:
    """The page.

    If the router is not on it, its first line says why. Takes about timeout_s at most, whoever is
    down.
    """
    answers = _ask([(router_name, "metrics"), *((name, "stats") for name in shard_names)], namespace, timeout_s)
    counted: RouterMetrics | None = answers.get(router_name)
    down = frozenset(counted.down) if counted else frozenset()
    router = RouterReport(router_name, counted.engine if counted else None, shard_names, down)
    # A shard that has not loaded yet answers, and holds no expert.
    held = {name: answers[name] for name in shard_names if name in answers and answers[name].experts_held}
    shards = [ShardReport(name, held[name].rows_computed if name in held else None) for name in shard_names]
    page = render(model_name, [router], shards)
    if counted is None:
        return _comment(f"{router_name} did not answer within {timeout_s:g} s") + page
    if counted.engine is None:
        return _comment(f"{router_name} has not loaded its model yet") + page
    return page


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

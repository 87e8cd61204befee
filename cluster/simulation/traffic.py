"""When requests come, and how long they are."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cluster.simulation.scenario import TrafficSection


class Arrival(NamedTuple):
    """A request: when it comes, and its tokens.

    position: where its first token is in a recorded trace; None: anywhere.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    position: int | None = None


def rate_at(traffic: TrafficSection, now_s: float) -> float:
    """Requests per second at a time; see TrafficSection."""
    match traffic.shape:
        case "bursts":
            factor = traffic.factor if now_s % traffic.period_s < traffic.burst_s else 1.0
        case "diurnal":
            swing = (1.0 - math.cos(2.0 * math.pi * now_s / traffic.period_s)) / 2.0
            factor = 1.0 + (traffic.factor - 1.0) * swing
        case "step":
            factor = traffic.factor if traffic.from_s <= now_s < traffic.until_s else 1.0
        case _:
            factor = 1.0
    return traffic.requests_per_s * factor


def arrivals(traffic: TrafficSection, duration_s: float, rng: np.random.Generator) -> Iterator[Arrival]:
    """The requests of an open loop, in order: a Poisson process whose rate changes, by thinning."""
    end_s = min(duration_s, math.inf if traffic.ends_s is None else traffic.ends_s)
    most = traffic.requests_per_s * max(1.0, traffic.factor)
    now_s = rng.exponential(1.0 / most)
    while now_s < end_s:
        if rng.random() * most < rate_at(traffic, now_s):
            yield arrival(traffic, now_s, rng)
        now_s += rng.exponential(1.0 / most)


def arrival(traffic: TrafficSection, now_s: float, rng: np.random.Generator) -> Arrival:
    """A request that comes now, of random length."""
    return Arrival(
        now_s,
        _length(traffic.prompt_tokens, traffic.spread, rng),
        _length(traffic.output_tokens, traffic.spread, rng),
    )


def _length(mean: int, spread: float, rng: np.random.Generator) -> int:
    return max(1, round(mean * (1.0 + spread * (2.0 * rng.random() - 1.0))))

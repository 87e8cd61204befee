"""The simulator's costs from live runs: what a router and a shard take.

Least squares of relative errors, each over the runs that are fitted. Pure arithmetic.

Legend: N runs, K costs, L MoE layers, S shards.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.simulation_runs import LiveRun, SimulatedRun
from cluster.simulation.route_table import ShardWork
from cluster.simulation.scenario import Scenario, parse_scenario
from cluster.simulation.step_time import StepTimer

Floats = npt.NDArray[np.float64]

LAYER_PHASES = ("attention", "dispatch")
"""What a router does in every layer; the phases that are left but expert_wait are per step."""
P99_SIGMAS = 2.326
"""Standard deviations from a normal distribution's median to its 99th percentile."""


def fitted_costs(runs: Sequence[LiveRun], simulated: Sequence[SimulatedRun], scenario: Scenario) -> dict[str, Any]:
    """The section `costs` of a scenario. simulated: the same runs, with any costs; their works count, not their times.

    The link is part of a shard's message_us: what a router waits for does not tell them apart.
    """
    layers = max(scenario.model.moe_layers, 1)
    steps_N, tokens_N = (np.array([getattr(run.counts, name) for run in runs], float) for name in ("steps", "tokens"))
    messages_N = np.array(
        [
            run.counts.steps * float(np.mean([(work.experts_LS > 0).sum() for work in of.works]))
            for run, of in zip(runs, simulated, strict=True)
        ]
    )
    phases_N = [dict(run.counts.phase_s) for run in runs]
    in_layers_N = np.array([sum(phases.get(name, 0.0) for name in LAYER_PHASES) for phases in phases_N])
    waited_N = np.array([phases.get("expert_wait", 0.0) for phases in phases_N])
    # Not only what the step clock sees: tokens must be handed out, and mail read, before the next step.
    beside_N = np.array([run.counts.busy_s for run in runs]) - in_layers_N - waited_N
    step_us, token_us = nonnegative(np.stack([steps_N, tokens_N], 1), beside_N) * 1e6
    design_NK = np.stack([steps_N * layers, tokens_N * layers, messages_N], 1)
    layer_us, layer_token_us, message_us = nonnegative(design_NK, in_layers_N) * 1e6
    shard = _shard_costs(runs, simulated, scenario, waited_N)
    return {
        "router": {
            "step_us": _short(step_us),
            "token_us": _short(token_us),
            "layer_us": _short(layer_us),
            "layer_token_us": _short(layer_token_us),
            "context_us": 0.0,
            "message_us": _short(message_us),
        },
        "shard": shard,
        "link": {"latency_us": 0.0},
        "jitter": 0.0,
    }


def _shard_costs(
    runs: Sequence[LiveRun], simulated: Sequence[SimulatedRun], scenario: Scenario, waited_N: Floats
) -> dict[str, Any]:
    """message_us, read_gb_s and row_us, so that the last shards' times sum up to what was waited for."""

    def predicted(costs_K: Floats) -> Floats:
        message_us, expert_us, row_us = costs_K
        read_gb_s = scenario.model.expert_bytes / max(expert_us, 1e-3) / 1e3
        shard = {"message_us": message_us, "read_gb_s": read_gb_s, "row_us": row_us}
        return np.array(
            [
                run.counts.steps / len(of.works) * waiting_s(scenario, run.point.shards, shard, of.works)
                for run, of in zip(runs, simulated, strict=True)
            ]
        )

    message_us, expert_us, row_us = least(lambda costs_K: predicted(costs_K) / waited_N - 1.0, (200.0, 10.0, 2.0))
    read_gb_s = scenario.model.expert_bytes / max(expert_us, 1e-3) / 1e3
    return {"message_us": _short(message_us), "read_gb_s": _short(read_gb_s), "row_us": _short(row_us)}


def waiting_s(scenario: Scenario, shards: int, shard: Mapping[str, float], works: Sequence[ShardWork]) -> float:
    """How long a router waits for the shards in these steps, if they have these costs and it has none."""
    raw = scenario.model_dump(mode="json")
    none = dict.fromkeys(raw["costs"]["router"], 0.0)
    raw["costs"] |= {"router": none, "link": {"latency_us": 0.0, "gb_s": 1e9}, "shard": dict(shard)}
    raw["shards"] |= {"count": shards, "per_node": shards}
    timer = StepTimer(parse_scenario(raw), shards)
    # The steps one after the other are one step of very many layers.
    joined = ShardWork(*(np.concatenate(parts) for parts in zip(*works, strict=True)))
    return timer.alone_s(timer.times(0, 0, joined, np.ones(shards)))


def fitted_jitter(pairs: Sequence[tuple[LiveRun, SimulatedRun]]) -> float:
    """What the simulated steps lack in spread; simulated: without jitter."""
    missing = [
        max(0.0, _spread(run.figures.gap_ms_p50, run.figures.gap_ms_p99) ** 2
            - _spread(of.figures.gap_ms_p50, of.figures.gap_ms_p99) ** 2)
        for run, of in pairs
    ]  # fmt: skip
    return _short(float(np.sqrt(median(missing))))


def _spread(p50: float, p99: float) -> float:
    """Of the logarithm, if it were normal."""
    return float(np.log(p99 / p50)) / P99_SIGMAS


def nonnegative(design_NK: Floats, seconds_N: Floats) -> Floats:
    """The costs_K of at least 0 whose products with the design come closest to the times, relative to these.

    >>> nonnegative(np.array([[1.0, 1.0], [1.0, 2.0]]), np.array([3.0, 5.0])).round(6).tolist()
    [1.0, 2.0]
    """
    from scipy.optimize import nnls

    scale_K = np.maximum(design_NK.max(axis=0), 1e-12)
    found_K, _ = nnls(design_NK / scale_K / seconds_N[:, None], np.ones(len(seconds_N)))
    costs_K: Floats = found_K / scale_K
    return costs_K


def least(errors: Callable[[Floats], Floats], start: Sequence[float]) -> Floats:
    """The numbers of at least 0 with the smallest sum of squared errors, found from `start` on."""
    from scipy.optimize import least_squares

    found = least_squares(errors, np.array(start), bounds=(0.0, np.inf), x_scale=np.array(start))
    costs_K: Floats = found.x
    return costs_K


def _short(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")

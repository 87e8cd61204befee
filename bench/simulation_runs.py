"""The same requests, asked of a live deployment and of the simulator.

The embedded model answers recorded text: a request's prompt begins where a window of
demo/routing_trace.npz does, so that the simulator knows the experts of its tokens. What the model
then makes is other text than the recorded one; the simulator goes on with the experts recorded
there, which are as skewed.
"""

import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.chaos.counters import samples
from bench.errors import BenchError
from bench.measure import check_complete, itl_ms, percentile
from bench.process import Worker
from bench.worker import Request, Stream
from checkpoint.config import ModelConfig
from cluster.simulation.recorder import Recorder
from cluster.simulation.route_table import ShardWork
from cluster.simulation.router import Told
from cluster.simulation.scenario import DEMO_TRACE, Scenario, parse_scenario
from cluster.simulation.simulation import Simulation
from cluster.simulation.traffic import Arrival

PROMPT_TOKENS, OUTPUT_TOKENS = 48, 96
SPREAD_S = 0.5
"""Requests come at random within so long: else all prompts would be one step."""
CORES = 2.0
"""Shards of one thread each that compute at full speed at once."""


@dataclass(frozen=True)
class Point:
    """A setting: shards, and requests at once."""

    shards: int
    streams: int


@dataclass(frozen=True)
class Figures:
    """What clients saw: tokens per second from the first request to the last token, and gaps between tokens."""

    tok_s: float
    gap_ms_p50: float
    gap_ms_p99: float


@dataclass(frozen=True)
class Counts:
    """What the router counted meanwhile. phase_s: see StepClock. busy_s: from the first request to the last token."""

    steps: int
    tokens: int
    step_s: float
    busy_s: float
    phase_s: Mapping[str, float]


@dataclass(frozen=True)
class LiveRun:
    point: Point
    repeat: int
    figures: Figures
    counts: Counts

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> "LiveRun":
        """From `asdict`."""
        counts = Counts(**raw["counts"])
        return cls(Point(**raw["point"]), raw["repeat"], Figures(**raw["figures"]), counts)


def requests_of(point: Point, repeat: int) -> tuple[list[Request], list[Arrival]]:
    """The requests of a run: for the live deployment, and the same for the simulator."""
    with np.load(DEMO_TRACE, allow_pickle=False) as stored:
        ids_T, window_T = stored["ids_T"], stored["window_T"]
    begins = np.flatnonzero(np.diff(window_T, prepend=-1) != 0)
    whole = begins[np.diff([*begins, len(window_T)]) >= PROMPT_TOKENS + OUTPUT_TOKENS]
    rng = np.random.default_rng([point.shards, point.streams, repeat])
    asked, simulated = [], []
    for at_s in np.sort(rng.random(point.streams) * SPREAD_S).tolist():
        position = int(rng.choice(whole))
        prompt = ids_T[position : position + PROMPT_TOKENS].tolist()
        output = int(rng.integers(OUTPUT_TOKENS // 2, OUTPUT_TOKENS * 3 // 2))
        asked.append(Request(prompt, output, at_s))
        simulated.append(Arrival(at_s, PROMPT_TOKENS, output, position))
    return asked, simulated


def figures_of(requests: Sequence[Request], streams: Sequence[Stream]) -> Figures:
    """What the clients of a live run saw."""
    check_complete("drover", requests, streams)
    gaps_ms = itl_ms(streams)
    tokens = sum(len(stream.token_ids) for stream in streams)
    begin_s, end_s = requests[0].at_s, max(stream.token_s[-1] for stream in streams)
    return Figures(tokens / (end_s - begin_s), percentile(gaps_ms, 50), percentile(gaps_ms, 99))


def live_runs(worker: Worker, metrics_url: str, points: Sequence[Point], repeats: int) -> Iterator[LiveRun]:
    """Ask the deployment that the worker speaks with; the repeats alternate between the points."""
    warm, _ = requests_of(Point(points[0].shards, 8), 1000)
    worker.ask(warm)
    for repeat in range(repeats):
        for point in points:
            asked, _ = requests_of(point, repeat)
            before = _read(metrics_url)
            answer = worker.ask(asked)
            after = _read(metrics_url)
            figures = figures_of(asked, answer.streams)
            end_s = max(stream.token_s[-1] for stream in answer.streams)
            risen = {key: after[key] - before.get(key, 0.0) for key in after}
            counts = Counts(
                round(risen["steps"]),
                round(risen["tokens"]),
                risen["step_s"],
                end_s - asked[0].at_s,
                {key.removeprefix("phase "): risen[key] for key in risen if key.startswith("phase ")},
            )
            yield LiveRun(point, repeat, figures, counts)


def _read(url: str) -> dict[str, float]:
    """The router's counters now, over all routers."""
    names = {
        "drover_step_seconds_count": "steps",
        "drover_step_seconds_sum": "step_s",
        "drover_prompt_tokens_total": "tokens",
        "drover_generation_tokens_total": "tokens",
    }
    sums: dict[str, float] = {}
    with urllib.request.urlopen(url, timeout=10.0) as page:
        found = samples(page.read().decode())
    for sample in found:
        key = names.get(sample.name)
        if sample.name == "drover_step_phase_seconds_total":
            key = f"phase {sample.labels['phase']}"
        if key is not None:
            sums[key] = sums.get(key, 0.0) + sample.value
    if "steps" not in sums:
        raise BenchError(f"{url} tells no steps; does a router run?")
    return sums


def scenario_of(config: ModelConfig, point: Point, costs: Mapping[str, Any]) -> Scenario:
    """The live deployment as a scenario."""
    size = 3 * config.hidden_size * config.intermediate_size * 2
    model = {
        "moe_layers": sum(layer.is_moe for layer in config.layers),
        "experts": config.num_experts,
        "experts_per_token": config.experts_per_token,
        "expert_bytes": size,
        "row_bytes": config.hidden_size * 2,
    }
    return parse_scenario(
        {
            "duration_s": 600.0,
            "sample_s": 600.0,
            "model": model,
            "shards": {"count": point.shards, "per_node": point.shards, "parallel": CORES},
            "routing": {"source": "trace"},
            "costs": costs,
        }
    )


class _Keeper(Recorder):
    """Keeps what every step asked of the shards, and every gap."""

    def __init__(self, layers: int, shards: int) -> None:
        super().__init__(layers, shards)
        self.works: list[ShardWork] = []
        self.gaps_ms: list[float] = []
        self.tokens = 0

    def step(self, told: Sequence[Told], work: ShardWork) -> None:
        super().step(told, work)
        self.works.append(work)
        self.tokens += len(told)
        self.gaps_ms += [1e3 * token.gap_s for token in told if not token.is_first]


@dataclass(frozen=True)
class SimulatedRun:
    """works: what each step asked of the shards."""

    figures: Figures
    works: Sequence[ShardWork]


def simulated_run(scenario: Scenario, point: Point, repeat: int) -> SimulatedRun:
    """The same requests, simulated until the last has its last token."""
    _, arrivals = requests_of(point, repeat)
    simulation = Simulation(scenario, arrivals)
    keeper = simulation.recorder = _Keeper(scenario.model.moe_layers, scenario.num_shards)
    simulation.run()
    tok_s = keeper.tokens / (simulation.last_token_s - arrivals[0].at_s)
    figures = Figures(tok_s, percentile(keeper.gaps_ms, 50), percentile(keeper.gaps_ms, 99))
    return SimulatedRun(figures, keeper.works)


def plain(runs: Sequence[LiveRun]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(run) for run in runs]


def metrics_url(file: Path) -> str:
    """Of the deployment whose file this is."""
    import yaml

    return f"http://127.0.0.1:{yaml.safe_load(file.read_text())['frontend']['http_port']}/metrics"

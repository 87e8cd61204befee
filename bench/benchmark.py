"""The whole benchmark, part by part: what runs when, and what becomes of it in results.json."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench import results
from bench.closed import ClosedRun, closed_runs
from bench.drover_server import ClusterShape
from bench.errors import BenchError
from bench.floor import model_bytes
from bench.long_prompt import long_prompt_effect
from bench.machine import alone, bandwidth_bytes_s, busy_cores, describe
from bench.measure import summary
from bench.open_loop import Targets, goodput, open_loop
from bench.prefix import prefix_effect
from bench.systems import DROVER, PEERS, Cluster, Setting, System, make_systems
from checkpoint.config import ModelConfig
from checkpoint.layout import count_parameters

SHARD_COUNTS = (1, 2, 4, 8)
SHARD_STREAMS = 32
QUIET_CORES = 0.2
BYTES_PER_VALUE = {"bfloat16": 2, "float16": 2, "float32": 4}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to run. parts: of PARTS. systems: names, in the order in which each repeat runs them. rates: requests per
    second of the open loop, each for duration_s seconds. lock: held while a system is measured, not in between."""

    setting: Setting
    parts: tuple[str, ...]
    systems: tuple[str, ...]
    concurrency: tuple[int, ...]
    repeats: int
    rates: tuple[float, ...]
    duration_s: float
    lock: Path | None = None


def run(plan: Plan, config: ModelConfig, say: Say) -> dict[str, Any]:
    """Run the plan and return the contents of results.json, of the parts that were run. Raises BenchError."""
    total, active = count_parameters(config)
    machine, date = describe(plan.setting.work), datetime.now(timezone.utc).isoformat(timespec="seconds")
    found: dict[str, Any] = {
        "machine": machine,
        "date": date,
        "parts": {part: {"date": date, "commit": machine["commit"], "cpu": machine["cpu"]} for part in plan.parts},
        "model": {"parameters": total, "active_parameters": active, "dtype": config.dtype},
        "cluster": asdict(plan.setting.shape),
    }
    if "closed" in plan.parts:
        found |= _closed(plan, config, say)
    if "open" in plan.parts:
        found["open_loop"] = _open(plan, config, say)
    if "prefix" in plan.parts:
        found["prefix"] = _prefix(plan, config, say)
    if "shards" in plan.parts:
        found["shards"] = _shards(plan, config, say)
    if "long" in plan.parts:
        found["long_prompt"] = _long(plan, say)
    return found


def present(plan: Plan, say: Say) -> list[System]:
    """The systems of the plan that can run here; for each other one a line. Raises BenchError if none can."""
    made = make_systems(plan.setting)
    systems = []
    for name in plan.systems:
        reason = made[name].absent_reason
        if reason is None:
            systems.append(made[name])
        else:
            say(reason)
    if not systems:
        raise BenchError(
            f"none of {', '.join(plan.systems)} can run here; `make bench-peers` installs {', '.join(PEERS)}"
        )
    return systems


def _closed(plan: Plan, config: ModelConfig, say: Say) -> dict[str, Any]:
    """Every system at every concurrency; repeats go through all systems in turn, so that a slow hour hits all alike."""
    runs: dict[tuple[str, int], list[ClosedRun]] = {}
    bandwidths: list[float] = []
    others: list[float] = []
    systems = present(plan, say)
    for repeat in range(plan.repeats):
        with alone(plan.lock):
            bandwidths.append(bandwidth_bytes_s(plan.setting.threads))
        say(f"repeat {repeat + 1} of {plan.repeats}: memory is read at {bandwidths[-1] / 1e9:.1f} GB/s")
        for system in systems:
            with alone(plan.lock):
                others.append(busy_cores())
                if others[-1] > QUIET_CORES:
                    say(f"  note: other processes keep {others[-1]:.1f} cores busy; the figures will be too low")
                with system.running() as running:
                    for streams in plan.concurrency:
                        done = list(closed_runs(running, system.name, streams, f"{repeat}", config.vocab_size))
                        runs.setdefault((system.name, streams), []).extend(done)
                        figures = summary([run.round for run in done])
                        say(f"  {system.name:18} {streams:3} streams: {figures.decode_tok_s:7.1f} tokens/s decoding")
    sizes = model_bytes(config, BYTES_PER_VALUE[config.dtype])
    bandwidth = max(bandwidths)  # what the machine can do; less was disturbed
    return {
        "runs": results.closed_objects(runs),
        "floor": [
            results.floor_object(runs, config, sizes, streams, bandwidth, BYTES_PER_VALUE[config.dtype])
            for streams in plan.concurrency
        ],
        "others_busy_cores_max": round(max(others), 2),
        "first_token_agreement": results.agreement(runs),
    }


def _open(plan: Plan, config: ModelConfig, say: Say) -> list[dict[str, Any]]:
    objects = []
    with alone(plan.lock), Cluster(plan.setting).running() as running:
        for rate in plan.rates:
            requests = open_loop(f"open {rate}", rate, plan.duration_s, config.vocab_size)
            if not requests:
                continue
            done = goodput(rate, requests, running.ask(requests).streams, Targets())
            say(f"  open loop, {rate:g} requests/s: {done['good']} of {done['requests']} met the targets")
            objects.append(done)
    return objects


def _prefix(plan: Plan, config: ModelConfig, say: Say) -> dict[str, Any]:
    with alone(plan.lock), Cluster(plan.setting).running() as running:
        effect = prefix_effect(running, DROVER, "prefix", config.vocab_size)
    cold_ms, warm_ms = effect["cold_ttft_ms_p50"], effect["warm_ttft_ms_p50"]
    say(f"  shared prefix: first token after {cold_ms:.0f} ms the first time, {warm_ms:.0f} ms later")
    return effect


def _long(plan: Plan, say: Say) -> dict[str, Any]:
    with alone(plan.lock):
        effect = long_prompt_effect(plan.setting.shape, plan.setting.work)
    say(
        f"  a prompt of {effect['prompt_tokens']:,} tokens: first token after {effect['long_ttft_s']:.0f} s; meanwhile "
        f"the inter-token latency of {effect['chats']} chats is {effect['p99_ratio']:.2f} times as long (p99)"
    )
    return effect


def _shards(plan: Plan, config: ModelConfig, say: Say) -> list[dict[str, Any]]:
    objects = []
    for count in SHARD_COUNTS:
        shape: ClusterShape = replace(plan.setting.shape, shards=count)
        with alone(plan.lock), Cluster(replace(plan.setting, shape=shape)).running() as running:
            done = [
                run
                for repeat in range(2)
                for run in closed_runs(running, DROVER, SHARD_STREAMS, f"shards {repeat}", config.vocab_size)
            ]
        figures = summary([run.round for run in done])
        say(f"  {shape}: {figures.decode_tok_s:.1f} tokens/s at {SHARD_STREAMS} streams")
        objects.append({**asdict(shape), "concurrency": SHARD_STREAMS, **asdict(figures)})
    return objects


def with_parts_kept(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """`found`, and of the file what `found` has not: a run of some parts leaves the others' figures.

    Machine and date stay the closed loop's; `parts` tells when each part was run, on which commit and which processor.
    """
    if "runs" in found or not path.exists():
        return found
    old = results.read(path)
    return old | found | {key: old[key] for key in ("machine", "date")} | {"parts": old["parts"] | found["parts"]}

"""bench/results.json: what it holds, and how it is made of runs."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

from bench.closed import ClosedRun
from bench.errors import BenchError
from bench.floor import ModelBytes, floor_tok_s, step_bytes, uniform_experts_hit
from bench.measure import summary
from bench.systems import DROVER, NAMES, ONE_PROCESS, PEERS
from bench.workload import OUTPUT_TOKENS, PROMPT_TOKENS
from checkpoint.config import ModelConfig

Runs = Mapping[tuple[str, int], Sequence[ClosedRun]]
"""By system and concurrency."""


def closed_objects(runs: Runs) -> list[dict[str, Any]]:
    """One object per system and concurrency: medians over rounds, rounded for reading."""
    objects = []
    for (system, concurrency), of_system in sorted(
        runs.items(), key=lambda item: (item[0][1], NAMES.index(item[0][0]))
    ):
        figures = {name: _rounded(value) for name, value in asdict(summary([run.round for run in of_system])).items()}
        cores = _rounded(median(run.worker_cores for run in of_system))
        extra = {"load_generator_cores": cores} if system == DROVER else {}
        objects.append({"system": system, "concurrency": concurrency, **figures, **extra})
    return objects


def experts_hit(runs: Runs, config: ModelConfig, concurrency: int) -> tuple[float, bool]:
    """(distinct experts per MoE layer of a decoding step, whether it was measured rather than computed)."""
    measured = [run.experts_hit for run in runs.get((ONE_PROCESS, concurrency), ()) if run.experts_hit is not None]
    if measured:
        return fmean(measured), True
    return uniform_experts_hit(config.num_experts, config.experts_per_token, concurrency), False


def floor_object(
    runs: Runs, config: ModelConfig, model: ModelBytes, concurrency: int, bandwidth_bytes_s: float, bytes_per_value: int
) -> dict[str, Any]:
    """The floor at one concurrency, with what it was computed from. The context is half way through the output."""
    hit, measured = experts_hit(runs, config, concurrency)
    kv_bytes = config.kv_bytes(PROMPT_TOKENS + OUTPUT_TOKENS // 2, bytes_per_value)
    nbytes = step_bytes(model, concurrency, hit, kv_bytes)
    return {
        "concurrency": concurrency,
        "experts_hit": _rounded(hit),
        "experts_hit_measured": measured,
        "step_bytes": round(nbytes),
        "bandwidth_gb_s": _rounded(bandwidth_bytes_s / 1e9),
        "floor_tok_s": _rounded(floor_tok_s(concurrency, nbytes, bandwidth_bytes_s)),
    }


def agreement(runs: Runs) -> dict[str, float]:
    """How many of the prompts' first tokens each system has in common with `drover`, or else with one process.

    Systems round differently, and random weights leave many near ties; a share far below the others' tells of a system
    that computes something else.
    """
    base = DROVER if any(system == DROVER for system, _ in runs) else ONE_PROCESS
    shares = {}
    for name in NAMES:
        pairs = [
            (ours, theirs)
            for (system, concurrency), of_system in runs.items()
            if system == name and (base, concurrency) in runs and name != base
            for run, other in zip(runs[base, concurrency], of_system, strict=False)
            for ours, theirs in zip(run.first_tokens, other.first_tokens, strict=True)
        ]
        if pairs:
            shares[name] = _rounded(sum(ours == theirs for ours, theirs in pairs) / len(pairs))
    return shares


def ratios(results: Mapping[str, Any], concurrency: int, system: str) -> dict[str, float]:
    """decode_tok_s of a system over that of each peer, the floor and one process, where they are known."""
    decode = {run["system"]: run["decode_tok_s"] for run in results["runs"] if run["concurrency"] == concurrency}
    floors = [floor["floor_tok_s"] for floor in results["floor"] if floor["concurrency"] == concurrency]
    others = {name: decode[name] for name in (*PEERS, ONE_PROCESS) if name in decode}
    others |= {"floor": floors[0]} if floors else {}
    return {name: decode[system] / other for name, other in others.items()} if system in decode else {}


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Replace the file at once. Raises BenchError."""
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise BenchError(f"{path} cannot be written: {error.strerror}") from None


def read(path: Path) -> dict[str, Any]:
    """The results in a file. Raises BenchError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BenchError(f"{path} does not exist; `make bench` writes it") from None
    except (OSError, ValueError) as error:
        raise BenchError(f"{path} cannot be read: {error}") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("runs"), list):
        raise BenchError(f"{path} holds no results of `make bench`")
    return raw


def _rounded(value: float) -> float:
    """Four significant digits, and whole numbers as they are."""
    return value if isinstance(value, int) else float(f"{value:.4g}")

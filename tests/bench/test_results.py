"""What results.json holds, made of runs by hand; and the file that is shipped."""

import io
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench import benchmark, results, table
from bench.closed import ClosedRun
from bench.drover_server import ClusterShape, deployment
from bench.errors import BenchError
from bench.floor import model_bytes
from bench.measure import Round
from bench.systems import NAMES
from cluster.config import parse_deployment
from tests.bench.test_floor import CONFIG

ROOT = Path(__file__).parents[2]
SHIPPED, README = ROOT / "bench" / "results.json", ROOT / "README.md"
ASKED_FOR = {
    "system",
    "concurrency",
    "decode_tok_s",
    "prefill_tok_s",
    "ttft_ms_p50",
    "ttft_ms_p99",
    "itl_ms_p50",
    "itl_ms_p99",
}


def a_run(total_s: float, first_tokens: tuple[int, ...] = (1, 2), hit: float | None = None) -> ClosedRun:
    return ClosedRun(Round(256, 254, 1.0, 1.0, total_s, [500.0, 1000.0], [10.0, 20.0]), 0.02, hit, first_tokens)


def made() -> dict[str, Any]:
    runs = {("vllm", 2): [a_run(3)], ("drover", 2): [a_run(2)], ("drover-one-process", 2): [a_run(2, (1, 3), 1.9)]}
    sizes = model_bytes(CONFIG, 2)
    return {
        "machine": {"cpu": "a processor", "cores": 2, "memory_gib": 24},
        "date": "2026-11-21T00:00:00+00:00",
        "parts": {
            part: {"date": "2026-11-21T00:00:00+00:00", "commit": "abc", "cpu": "a processor"}
            for part in ("closed", "prefix")
        },
        "runs": results.closed_objects(runs),
        "floor": [results.floor_object(runs, CONFIG, sizes, 2, 40e9, 2)],
        "first_token_agreement": results.agreement(runs),
    }


def test_an_object_per_system_and_concurrency() -> None:
    objects = made()["runs"]
    assert [(run["system"], run["concurrency"]) for run in objects] == [
        ("drover", 2),
        ("drover-one-process", 2),
        ("vllm", 2),
    ]
    assert all(set(run) >= ASKED_FOR for run in objects)
    assert objects[0]["decode_tok_s"] == 254
    assert objects[0]["load_generator_cores"] == 0.02


def test_ratios_are_to_peers_one_process_and_the_floor() -> None:
    ratios = results.ratios(made(), 2, "drover")
    assert ratios["vllm"] == pytest.approx(2)
    assert ratios["drover-one-process"] == pytest.approx(1)
    assert ratios["floor"] == pytest.approx(254 / made()["floor"][0]["floor_tok_s"])
    assert "llama.cpp" not in ratios


def test_experts_hit_are_measured_or_said_not_to_be() -> None:
    assert made()["floor"][0]["experts_hit"] == 1.9
    assert results.experts_hit({}, CONFIG, 32) == (pytest.approx(28.4, abs=0.05), False)


def test_what_systems_computed_is_compared() -> None:
    assert made()["first_token_agreement"] == {"drover-one-process": 0.5, "vllm": 1.0}


def test_a_run_of_some_parts_leaves_the_others(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    results.write(file, made())
    later = {"machine": {}, "date": "later", "parts": {"shards": {"date": "later"}}, "shards": [1]}
    kept = benchmark.with_parts_kept(file, later)
    assert (kept["date"], kept["shards"], len(kept["runs"])) == (made()["date"], [1], 3)
    dates = {part: ran["date"] for part, ran in kept["parts"].items()}
    assert dates == {"closed": made()["date"], "prefix": made()["date"], "shards": "later"}
    assert benchmark.with_parts_kept(file, {"runs": []}) == {"runs": []}
    assert benchmark.with_parts_kept(tmp_path / "absent", later) == later


def test_the_tables_show_every_system() -> None:
    text = io.StringIO()
    table.show(made(), Console(file=text, width=200))
    assert all(name in text.getvalue() for name in ("drover", "drover-one-process", "vllm", "bandwidth floor"))


@pytest.mark.parametrize("content", [None, "{", "[]", '{"runs": 1}'], ids=["absent", "cut", "list", "other"])
def test_a_file_without_results_is_told(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(BenchError, match=r"results\.json (does not exist|cannot be read|holds no results)"):
        results.read(file)


def test_the_deployment_is_a_valid_one() -> None:
    config = parse_deployment(deployment(Path("/models/mini"), ClusterShape(1, 8, 1), 64, 9000, 8000))
    assert (config.shards.count, config.router.threads, config.engine.max_running) == (8, 1, 64)


def test_the_shipped_results_are_complete() -> None:
    shipped = results.read(SHIPPED)
    assert all(set(run) >= ASKED_FOR and run["system"] in NAMES for run in shipped["runs"])
    assert {run["system"] for run in shipped["runs"]} == set(NAMES)
    of_system = {name: [run["concurrency"] for run in shipped["runs"] if run["system"] == name] for name in NAMES}
    assert all(streams == [1, 8, 32, 64] for streams in of_system.values())
    assert shipped["machine"]["cores"] >= 1
    assert datetime.fromisoformat(shipped["date"])


def test_the_readme_states_the_shipped_results() -> None:
    shipped, readme = results.read(SHIPPED), README.read_text()
    for streams in (1, 8, 32, 64):
        decode = {run["system"]: run["decode_tok_s"] for run in shipped["runs"] if run["concurrency"] == streams}
        assert f"| {streams} | {' | '.join(f'{decode[name]:.0f}' for name in NAMES)} |" in readme

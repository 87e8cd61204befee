"""Costs that are known are found again from runs that were simulated with them; and the file that is shipped."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import live_and_simulated, simulation_fit
from bench.simulation_runs import Counts, LiveRun, Point, SimulatedRun, requests_of, scenario_of, simulated_run
from bench.worker import Stream
from checkpoint.config import read_config

ROOT = Path(__file__).parents[2]
CONFIG = read_config(ROOT / "demo" / "drover-demo")
SHIPPED, DOCS = ROOT / "bench" / "simulation.json", ROOT / "docs" / "simulation.md"
TRUE: dict[str, Any] = {
    "router": {"step_us": 900.0, "token_us": 30.0, "layer_us": 250.0, "layer_token_us": 8.0, "message_us": 60.0},
    "shard": {"message_us": 150.0, "read_gb_s": 4.0, "row_us": 3.0},
    "link": {"latency_us": 0.0, "gb_s": 1e6},
    "jitter": 0.0,
}
POINTS = (Point(1, 1), Point(1, 12), Point(4, 2), Point(4, 12))


def as_if_live(point: Point) -> tuple[LiveRun, SimulatedRun]:
    """A run of the simulator with the true costs, told as a live one would be."""
    scenario = scenario_of(CONFIG, point, TRUE)
    of = simulated_run(scenario, point, 0)
    steps, layers = len(of.works), scenario.model.moe_layers
    tokens = sum(int(work.rows_LS.sum()) for work in of.works) // layers
    messages = sum(int((work.experts_LS > 0).sum()) for work in of.works)
    router = TRUE["router"]
    waited_s = simulation_fit.waiting_s(scenario, point.shards, TRUE["shard"], of.works)
    layers_us = steps * layers * router["layer_us"] + tokens * layers * router["layer_token_us"]
    in_layers_s = 1e-6 * (layers_us + messages * router["message_us"])
    beside_s = 1e-6 * (steps * router["step_us"] + tokens * router["token_us"])
    phase_s = {"attention": in_layers_s / 2, "dispatch": in_layers_s / 2, "expert_wait": waited_s, "sample": beside_s}
    total_s = in_layers_s + beside_s + waited_s
    return LiveRun(point, 0, of.figures, Counts(steps, tokens, total_s, total_s, phase_s)), of


def test_known_costs_are_found_again() -> None:
    runs, simulated = zip(*(as_if_live(point) for point in POINTS), strict=True)
    costs = simulation_fit.fitted_costs(runs, simulated, scenario_of(CONFIG, POINTS[0], {}))
    for section in ("router", "shard"):
        for name, value in TRUE[section].items():
            assert costs[section][name] == pytest.approx(value, rel=0.02), name


def test_jitter_makes_up_for_spread_that_is_missing() -> None:
    run, of = as_if_live(Point(2, 4))
    spread_out = replace(run, figures=replace(of.figures, gap_ms_p99=of.figures.gap_ms_p50 * np.exp(2.326 * 0.2)))
    even = replace(of, figures=replace(of.figures, gap_ms_p99=of.figures.gap_ms_p50))
    assert simulation_fit.fitted_jitter([(spread_out, even)]) == pytest.approx(0.2, rel=1e-3)
    assert simulation_fit.fitted_jitter([(replace(run, figures=of.figures), of)]) == 0


def test_both_sides_are_asked_the_same() -> None:
    asked, simulated = requests_of(Point(3, 8), 1)
    assert len(asked) == 8
    for request, arrival in zip(asked, simulated, strict=True):
        told = (request.at_s, len(request.token_ids), request.max_tokens)
        assert told == (arrival.at_s, arrival.prompt_tokens, arrival.output_tokens)
    assert requests_of(Point(3, 8), 2)[0] != asked


def test_figures_are_those_of_the_streams() -> None:
    asked, _ = requests_of(Point(1, 1), 0)
    request = replace(asked[0], max_tokens=3)
    at_s = request.at_s
    stream = Stream([at_s + 0.1, at_s + 0.2, at_s + 0.4], [1, 2, 3])
    figures = live_and_simulated_figures(request, stream)
    assert figures == pytest.approx((3 / 0.4, 150.0, 199.0))


def live_and_simulated_figures(request: Any, stream: Stream) -> tuple[float, float, float]:
    from bench.simulation_runs import figures_of

    figures = figures_of([request], [stream])
    return figures.tok_s, figures.gap_ms_p50, figures.gap_ms_p99


def test_rows_tell_medians_and_errors_in_percent() -> None:
    figures = as_if_live(Point(1, 1))[1].figures
    row = live_and_simulated.row_of(Point(3, 1), [figures], [replace(figures, tok_s=figures.tok_s * 1.1)])
    assert (row["held_out"], row["error_tok_s"], row["error_gap_ms_p99"]) == (True, 10.0, 0.0)
    assert live_and_simulated.errors_of([row]) == {
        "held_out": {"tok_s_median": 10.0, "tok_s_worst": 10.0, "gap_ms_p99_median": 0.0, "gap_ms_p99_worst": 0.0}
    }


@pytest.mark.parametrize("text", ["0", "a", "65", "1,,2"])
def test_wrong_counts_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        live_and_simulated.main(["--shards", text])
    assert end.value.code == 2
    assert "no whole numbers from 1 to 64" in capsys.readouterr().err


def test_tables_go_between_the_marks_of_the_document_and_again() -> None:
    figures = as_if_live(Point(1, 1))[1].figures
    rows = [live_and_simulated.row_of(Point(3, 1), [figures], [figures])]
    found = {"machine": {"cores": 2, "cpu": "a processor"}, "date": "2026-11-26T20:00:00", "rows": rows}
    found["errors"] = live_and_simulated.errors_of(rows)
    once = live_and_simulated.documented(DOCS.read_text(), found)
    assert "on 2 cores of a processor" in once
    assert all(line in once for line in live_and_simulated.tables(found))
    assert once.endswith(DOCS.read_text().partition(live_and_simulated.END)[2])
    assert live_and_simulated.documented(once, found) == once


@pytest.mark.skipif(not SHIPPED.exists(), reason="nothing has been measured yet")
def test_the_documented_tables_are_those_of_the_shipped_file() -> None:
    """python -m bench.live_and_simulated --table"""
    for line in live_and_simulated.tables(json.loads(SHIPPED.read_text())):
        assert line in DOCS.read_text()

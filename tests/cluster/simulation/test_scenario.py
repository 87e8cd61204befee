"""A scenario file: every wrong key or value is named, with what is valid."""

from pathlib import Path

import pytest
import yaml

from cluster.config import ConfigError
from cluster.simulation.scenario import Scenario, parse_scenario
from cluster.simulation.scenario_file import load_scenario

ROOT = Path(__file__).parents[3]
SHIPPED = ROOT / "deploy" / "simulation.yaml"

WRONG = {
    "durations: 3": "durations is unknown; valid keys here are duration_s, sample_s",
    "duration_s: 0": "duration_s is 0: input should be greater than 0",
    "shards: {slot: 3}": "shards.slot is unknown; valid keys here are count, slots",
    "shards: {count: 200}": "shards.count is 200; with 128 experts, at most 128 have any",
    "shards: {replicas: 9}": "shards.replicas is 9, and shards.count is 4",
    "shards: {slots: 32}": "shards.slots is 32; 128 experts with 1 replicas on 4 shards need 32, and one for moves: "
    "at least 33",
    "costs: {router: {step_ms: 1}}": "costs.router.step_ms is unknown; valid keys here are step_us",
    "costs: {shard: {load_slowdown: 0.5}}": "costs.shard.load_slowdown is 0.5",
    "routing: {hot: [{expert: 3}]}": "routing.hot.0.expert is unknown; valid keys here are experts, share",
    "routing: {hot: [{from_s: 5, until_s: 5}]}": "until_s is 5; it must be above from_s (5)",
    "routing: {source: random}": "routing.source is 'random': input should be 'zipf', 'uniform' or 'trace'",
    "traffic: {spread: 1}": "traffic.spread is 1",
    "engine: {max_step_tokens: 8}": "max_step_tokens is 8; it must be at least max_running (64)",
    "engine: {kv_tokens: 64}": "engine.kv_tokens is 64; one request may need",
    "faults: [{shard: 4, at_s: 1}]": "faults: shard 4 is none of the 4 shards, from 0",
    "autoscale: {shards: {min: 2, max: 4}}": "autoscale.shards.min is 2; so few hold 2 * 32 experts",
    "autoscale: {shards: {min: 5, max: 4}}": "autoscale.shards: min is 5 and max is 4",
    "autoscale: {stable_window: 4}": "autoscale.stable_window is unknown; valid keys here are paused",
    "model: {experts: 4, experts_per_token: 8}": "experts_per_token is 8, and there are 4 experts",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_named_with_the_fix(text: str, tmp_path: Path) -> None:
    path = tmp_path / "scenario.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_scenario(path)
    assert str(error.value).startswith(f"{path} is not a valid scenario: ")
    assert WRONG[text] in str(error.value)


def test_the_shipped_file_shows_every_key_with_its_default() -> None:
    assert load_scenario(SHIPPED) == Scenario()
    text = SHIPPED.read_text()
    assert all(f"{key}:" in text for key in _keys(Scenario().model_dump()))


def _keys(raw: object) -> list[str]:
    if isinstance(raw, dict):
        return [name for key, value in raw.items() for name in (str(key), *_keys(value))]
    return []


def test_what_is_commented_out_in_the_shipped_file_is_valid(tmp_path: Path) -> None:
    """Without the # before a key it is YAML that Drover takes."""
    lines = [line.replace("  # ", "  ", 1) if _is_key(line) else line for line in SHIPPED.read_text().splitlines()]
    raw = yaml.safe_load("\n".join(lines))
    assert raw["shards"]["parallel"] == 2
    assert parse_scenario(raw).routing.drift_s == 20


def _is_key(line: str) -> bool:
    return line.startswith("  # ") and line.split()[1].endswith(":")


def test_limits_default_to_what_there_is_at_the_start() -> None:
    scenario = parse_scenario({"autoscale": {"shards": {"min": 4, "max": 9}}, "routers": 2})
    settings = scenario.scale_settings
    assert (settings.shards.min, settings.shards.max, settings.routers.min, settings.routers.max) == (4, 9, 2, 2)
    assert (scenario.most_shards, Scenario().most_shards) == (9, 4)


def test_overrides_and_files_relative_to_the_scenario(tmp_path: Path) -> None:
    path = tmp_path / "scenario.yaml"
    path.write_text("routing: {trace: mine.npz}\nshards:\n")
    scenario = load_scenario(path, ["shards.count=7", "traffic.shape=closed"])
    assert scenario.routing.trace == tmp_path / "mine.npz"
    assert (scenario.shards.count, scenario.traffic.shape) == (7, "closed")
    assert load_scenario(None) == Scenario()


def test_measured_costs_replace_the_scenarios(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text('{"costs": {"jitter": 0.5, "router": {"step_us": 7.0}}, "rows": []}')
    costs = load_scenario(None, ["costs.jitter=0.25"], path).costs
    assert (costs.router.step_us, costs.jitter) == (7.0, 0.25)
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"measured\.json has no costs; bench/simulation\.json is an example"):
        load_scenario(None, [], path)


def test_a_file_that_is_not_there_names_an_example(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"deploy/simulation\.yaml is an example of a scenario file"):
        load_scenario(tmp_path / "none.yaml")

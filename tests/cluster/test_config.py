"""A deployment file is read once, validated once and frozen; every error names the key, the value and what is valid."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from checkpoint.tensors import Checkpoint
from cluster.actors.specs import router_spec
from cluster.config import SECTIONS, ConfigError, DeploymentConfig, load_deployment, parse_deployment
from router.kv_budget import KvBudget
from router.schedule.limits import DEFAULT_LIMITS
from tests.command import ROOT

LOCAL = ROOT / "deploy" / "local.yaml"


def written(folder: Path, text: str) -> Path:
    path = folder / "deployment.yaml"
    path.write_text(text)
    return path


def test_the_shipped_file_shows_the_defaults() -> None:
    shown = yaml.safe_load(LOCAL.read_text())
    defaults = parse_deployment({"checkpoint": "/somewhere"}).model_dump()
    for section in SECTIONS:
        for key, value in shown[section].items():
            assert defaults[section][key] == value, f"{section}.{key}"
    assert set(shown) <= set(DeploymentConfig.model_fields)


def test_a_file_that_says_nothing_is_served_as_a_checkpoint_without_a_file() -> None:
    checkpoint = ROOT / "demo" / "drover-demo"
    spec = router_spec(parse_deployment({"checkpoint": str(checkpoint)}), Checkpoint.open(checkpoint))
    assert replace(spec.limits, kv_bytes=DEFAULT_LIMITS.kv_bytes) == DEFAULT_LIMITS
    assert spec.kv_budget == KvBudget()


def test_the_kv_cache_is_as_large_as_the_key_says_that_was_set() -> None:
    budgets = [
        parse_deployment({"checkpoint": "a", "engine": engine}).engine.kv_budget
        for engine in ({"kv_bytes": 5}, {"kv_share": 0.5})
    ]
    assert budgets == [KvBudget(bytes=5), KvBudget(share=0.5)]


def test_a_relative_checkpoint_is_relative_to_the_file(tmp_path: Path) -> None:
    config = load_deployment(written(tmp_path, "checkpoint: models/scout"))
    assert config.checkpoint == tmp_path / "models" / "scout"
    assert config.name == "scout"


def test_the_home_directory_is_expanded(tmp_path: Path) -> None:
    assert load_deployment(written(tmp_path, "checkpoint: ~/scout")).checkpoint == Path.home() / "scout"


def test_overrides_replace_what_the_file_says(tmp_path: Path) -> None:
    path = written(tmp_path, "checkpoint: a\nshards: {count: 3}\n")
    config = load_deployment(path, ["shards.count=5", "engine.max_running=7", "checkpoint=/b"])
    assert (config.shards.count, config.engine.max_running, config.checkpoint) == (5, 7, Path("/b"))


def test_a_section_with_nothing_in_it_keeps_its_defaults(tmp_path: Path) -> None:
    assert load_deployment(written(tmp_path, "checkpoint: a\nshards:\n")).shards.count == 2


def test_it_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError):
        parse_deployment({"checkpoint": "a"}).shards.count = 3  # type: ignore[misc]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no checkpoint": ({"checkpoint": ""}, "checkpoint is missing"),
    "an unknown key": ({"shard": {}}, "shard is unknown; valid keys here are checkpoint,"),
    "an unknown key in a section": ({"shards": {"cuont": 3}}, "shards.cuont is unknown; valid keys here are"),
    "fewer than no shards": (
        {"shards": {"count": -1}},
        "shards.count is -1: input should be greater than or equal to 0",
    ),
    "a word for a number": ({"shards": {"count": "three"}}, "shards.count is 'three': input should be a valid integer"),
    "yes for a number": ({"shards": {"count": True}}, "shards.count is True: input should be a valid integer"),
    "infinitely many CPUs": ({"router": {"cpus": float("inf")}}, "router.cpus is inf: input should be a finite"),
    "negative CPUs": ({"shards": {"cpus": -1.0}}, "shards.cpus is -1.0"),
    "an unknown device": ({"router": {"device": "tpu"}}, "router.device is 'tpu': input should be 'cpu' or 'cuda'"),
    "cuda without a GPU": ({"router": {"device": "cuda"}}, "router: device is 'cuda' but gpus is 0; set gpus"),
    "NCCL on CPUs": ({"links": {"backend": "nccl"}}, "router.device and shards.device must both be 'cuda'"),
    "an impatient link": ({"links": {"dead_after_ms": 200.0}}, "dead_after_ms is 200; it must be at least 3 *"),
    "a port out of range": ({"frontend": {"grpc_port": 70000}}, "frontend.grpc_port is 70000"),
    "the same port twice": ({"frontend": {"http_port": 9000}}, "grpc_port and http_port are both 9000"),
    "steps too small": ({"engine": {"max_step_tokens": 8}}, "max_step_tokens is 8; it must be at least max_running"),
    "two budgets": ({"engine": {"kv_bytes": 1, "kv_share": 0.5}}, "engine: kv_bytes and kv_share are both set"),
    "a share that is all": ({"engine": {"kv_share": 1.0}}, "engine.kv_share is 1.0: input should be less than 1"),
    "a section that is a list": ({"engine": [1]}, "engine is [1]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_named_with_its_key(name: str) -> None:
    changes, message = WRONG[name]
    with pytest.raises(ConfigError) as error:
        parse_deployment({"checkpoint": "/a"} | changes, "my.yaml")
    assert str(error.value).startswith("my.yaml is not a valid deployment: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_every_wrong_key_is_listed_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        parse_deployment({"checkpoint": "/a", "shards": {"count": -1}, "nonsense": 1})
    first, *problems = str(error.value).splitlines()
    assert first == "config is not a valid deployment:"
    assert [problem.split(" is ")[0] for problem in problems] == ["  shards.count", "  nonsense"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "is not valid YAML"), ("just words", "holds a str"), ("checkpoint: a\nshards: 3\n", "shards is 3")],
)
def test_a_file_that_is_no_deployment(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_deployment(written(tmp_path, text))


BAD_YAML = {
    "shards: {count: 3\nrouter: [\n": "line 2, column 7: while parsing a flow mapping, expected ',' or '}'",
    "checkpoint: a: b\n": "line 1, column 14: mapping values are not allowed here",
    "checkpoint: a\0\n": "unacceptable character #x0000: special characters are not allowed",
}


@pytest.mark.parametrize("text", BAD_YAML)
def test_bad_yaml_is_one_line_with_its_place(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load_deployment(path)
    assert str(error.value).startswith(f"{path} is not valid YAML: {BAD_YAML[text]}")
    assert "\n" not in str(error.value)


def test_bad_yaml_in_an_override_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_deployment(written(tmp_path, "checkpoint: a\n"), ["shards=[1"])
    assert str(error.value).startswith(
        "'shards=[1' has a value that is not valid YAML: line 1, column 3: while parsing"
    )
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_names_an_example(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"deploy/local\.yaml is an example"):
        load_deployment(tmp_path / "none.yaml")


@pytest.mark.parametrize("override", ["shards.count", "=3", "dtype.what=3"])
def test_an_override_that_is_none(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="override|cannot be set"):  # noqa: RUF043
        load_deployment(written(tmp_path, "checkpoint: a\ndtype: auto\n"), [override])

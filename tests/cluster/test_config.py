"""A deployment is validated once and frozen; every error names the key, the value and what is valid."""

from dataclasses import replace
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from checkpoint.tensors import Checkpoint
from cluster.actors.specs import frontend_spec, router_specs
from cluster.config import SECTIONS, ConfigError, DeploymentConfig, parse_deployment
from cluster.policy.judgement import Limits
from router.kv_budget import KvBudget
from router.schedule.limits import DEFAULT_LIMITS
from tests.command import ROOT

LOCAL = ROOT / "deploy" / "local.yaml"


def test_the_shipped_file_shows_the_defaults() -> None:
    shown = yaml.safe_load(LOCAL.read_text())
    defaults = parse_deployment({"checkpoint": "/somewhere"}).model_dump()
    for section in SECTIONS:
        for key, value in shown[section].items():
            assert defaults[section][key] == value, f"{section}.{key}"
    assert set(shown) <= set(DeploymentConfig.model_fields)


def test_a_file_that_says_nothing_is_served_as_a_checkpoint_without_a_file() -> None:
    checkpoint = ROOT / "demo" / "drover-demo"
    spec = router_specs(parse_deployment({"checkpoint": str(checkpoint)}), Checkpoint.open(checkpoint))[0]
    assert replace(spec.limits, kv_bytes=DEFAULT_LIMITS.kv_bytes) == DEFAULT_LIMITS
    assert spec.kv_budget == KvBudget()


def test_frontends_know_as_many_routers_as_the_file_says() -> None:
    checkpoint = Checkpoint.open(ROOT / "demo" / "drover-demo")
    config = parse_deployment({"checkpoint": str(ROOT / "demo" / "drover-demo"), "router": {"count": 3}})
    names = tuple(spec.name for spec in router_specs(config, checkpoint))
    assert names == frontend_spec(config, checkpoint).router_names == ("router-0", "router-1", "router-2")


def test_the_kv_cache_is_as_large_as_the_key_says_that_was_set() -> None:
    budgets = [
        parse_deployment({"checkpoint": "a", "engine": engine}).engine.kv_budget
        for engine in ({"kv_bytes": 5}, {"kv_share": 0.5})
    ]
    assert budgets == [KvBudget(bytes=5), KvBudget(share=0.5)]


def test_nothing_scales_that_has_no_limits() -> None:
    told = {"checkpoint": "a", "shards": {"count": 3}, "autoscale": {"routers": {"min": 1, "max": 4}, "cooldown_s": 5}}
    settings = parse_deployment(told).scale_settings
    assert (settings.shards, settings.routers, settings.frontends) == (Limits(3, 3), Limits(1, 4), Limits(1, 1))
    assert settings.cooldown_s == 5
    assert parse_deployment({"checkpoint": "a", "shards": {"count": 0}}).scale_settings.shards == Limits(0, 0)


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
    "admin's port is taken": ({"admin": {"port": 9000}}, "admin.port is 9000, which is a port of the frontend"),
    "a token file somewhere": ({"admin": {"token_file": "token"}}, "admin.token_file is 'token': it must be absolute"),
    "steps too small": ({"engine": {"max_step_tokens": 8}}, "max_step_tokens is 8; it must be at least max_running"),
    "two budgets": ({"engine": {"kv_bytes": 1, "kv_share": 0.5}}, "engine: kv_bytes and kv_share are both set"),
    "a share that is all": ({"engine": {"kv_share": 1.0}}, "engine.kv_share is 1.0: input should be less than 1"),
    "an unknown limit": (
        {"autoscale": {"shards": {"min": 2, "max": 3, "most": 2}}},
        "autoscale.shards.most is unknown; valid keys here are min, max",
    ),
    "limits upside down": (
        {"autoscale": {"routers": {"min": 3, "max": 2}}},
        "autoscale.routers: min is 3 and max is 2; min must not be more than max",
    ),
    "too few shards for the replicas": (
        {"placement": {"replicas": 2}, "autoscale": {"shards": {"min": 1, "max": 4}}},
        "autoscale.shards.min is 1, and placement.replicas is 2",
    ),
    "a panic longer than calm": (
        {"autoscale": {"panic_window_s": 90}},
        "autoscale: stable_window_s is 60; it must be at least panic_window_s (90)",
    ),
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

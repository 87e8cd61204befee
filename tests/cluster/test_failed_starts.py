"""Starts that fail on a Ray that goes on: the error says what is wrong, and nothing is left on the cluster."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from checkpoint.errors import DroverError
from cluster import launch, teardown
from cluster.config import DeploymentConfig
from cluster.names import actor_names, app_name
from cluster.stored_events import read_events, write_events
from cluster.teardown import serve_applications
from tests.cluster.commands import START_S, marked_environment, write_deployment_file
from tests.cluster.deployment import NAMESPACE, RAY, SharedRay, Silent, deployment_config
from tests.command import drover_process
from tests.processes import wait_until
from tests.reference import Reference


@pytest.fixture(scope="module", autouse=True)
def _nothing_runs(shared_ray: SharedRay) -> None:
    shared_ray.clear()


@pytest.fixture(scope="module")
def checkpoint(reference_of: Callable[[str], Reference]) -> Path:
    return reference_of("maverick").directory


def start_fails(checkpoint: Path, **changes: Any) -> str:
    """Start on the running Ray, as on any cluster that others use as well; returns what went wrong."""
    on_cluster = RAY | {"address": ray.get_runtime_context().gcs_address}
    with pytest.raises(DroverError) as error:
        launch.start(deployment_config(checkpoint, ray=on_cluster, **changes), Silent())
    wait_until(lambda: not actor_names(NAMESPACE))
    assert serve_applications() == []
    with pytest.raises(ValueError, match="Failed to look up"):
        ray.util.get_placement_group(app_name(NAMESPACE))
    return str(error.value)


def test_more_shards_than_experts(checkpoint: Path) -> None:
    message = start_fails(checkpoint, shards={"count": 129})
    assert "shards.count is 129; the model has 128 experts, so it must be from 1 to 128" in message


def test_more_experts_than_slots(checkpoint: Path) -> None:
    message = start_fails(checkpoint, shards={"count": 3, "slots": 43})
    assert "shards.slots is 43; 3 shards with placement.replicas 1 begin with 43 experts of a layer each" in message
    assert "set it to at least 44" in message


def test_a_shard_that_fails_to_load_is_named(checkpoint: Path) -> None:
    """All looks right to the launcher, but the shards' processes find no GPU to put their weights on."""
    message = start_fails(checkpoint, shards={"count": 2, "cpus": 0.1, "device": "cuda", "gpus": 0.1})
    assert "shard-" in message
    assert "failed to start" in message


def test_what_an_earlier_deployment_has_left_is_forgotten(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its actors may have ended without drover stop."""
    found = []

    def end(config: DeploymentConfig) -> None:
        found.append(read_events(NAMESPACE))
        teardown.end(config)

    monkeypatch.setattr(launch, "end", end)
    write_events(NAMESPACE, "[]")
    assert "no room for the actors" in start_fails(checkpoint, shards={"count": 2, "cpus": 1e6})
    assert found == [""]


def remove(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).unlink()


def truncate_weights(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1000)


def make_weights_integers(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'"F32"', b'"I32"'))


def double_the_configured_width(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a missing weights file": (remove("model.safetensors"), "model.safetensors"),
    "a truncated weights file": (truncate_weights, "truncated"),
    "a wrong dtype": (make_weights_integers, "I32"),
    "impossible shapes": (double_the_configured_width, "has shape [400, 32]; the config calls for [400, 64]"),
    "a missing tokenizer": (remove("tokenizer.json"), "tokenizer.json"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_not_served(name: str, checkpoint: Path, tmp_path: Path) -> None:
    damage, message = DAMAGES[name]
    copy = shutil.copytree(checkpoint, tmp_path / "damaged")
    damage(copy)
    assert message in start_fails(copy)


def test_drover_serve_of_a_damaged_checkpoint_ends_with_one_line_and_no_process(
    checkpoint: Path, tmp_path: Path
) -> None:
    """The command in a process of its own; what it says of other damages is what the launcher says above.

    The deployment comes by a pipe, which can be read only once: the child is told what its parent has read.
    """
    copy = shutil.copytree(checkpoint, tmp_path / "damaged")
    truncate_weights(copy)
    deployment_file = write_deployment_file(tmp_path / "deployment.yaml", copy)
    with marked_environment() as environment:
        failed = drover_process(
            "serve", "/dev/stdin", stdin=deployment_file.read_text(), env=environment, timeout_s=START_S
        )
    assert (failed.returncode, failed.stdout) == (1, "")
    *stages, last = failed.stderr.splitlines()
    assert last.startswith("drover: error: ")
    assert "model.safetensors" in last
    assert "truncated" in last
    assert [line for line in stages if not line.startswith("[")] == []

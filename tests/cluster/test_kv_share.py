"""`engine.kv_share` is of what router and shards leave free: the router looks when every shard has loaded."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from checkpoint.tensors import Checkpoint
from cluster import launch
from cluster.actors.remote import RemoteRouter, RemoteShard
from cluster.actors.router import RouterSpec
from cluster.actors.shard import ShardSpec
from cluster.actors.specs import router_specs, shard_specs
from cluster.config import DeploymentConfig
from cluster.reports import ActorState, Phase
from tests.cluster.deployment import KV_SHARE, NAMESPACE, SharedRay, Silent, deployment_config, router_stats
from tests.processes import PATIENCE_S, wait_until
from tests.reference import Reference


@pytest.fixture(scope="module")
def directory(reference_of: Callable[[str], Reference]) -> Path:
    return reference_of("scout").directory


@pytest.fixture(autouse=True)
def _nothing_runs_before_or_after(shared_ray: SharedRay) -> Iterator[None]:
    shared_ray.clear()
    yield
    shared_ray.clear()


def config_of(directory: Path, **engine: Any) -> DeploymentConfig:
    return deployment_config(directory, engine=engine)


def create(cls: type, spec: RouterSpec | ShardSpec) -> Any:
    options = {"name": spec.name, "namespace": NAMESPACE, "lifetime": "detached", "num_cpus": 0.1}
    return ray.remote(cls).options(**options).remote(spec)


def state_of(router: Any) -> ActorState:
    state: ActorState = ray.get(router.state.remote(), timeout=PATIENCE_S)
    return state


def test_the_router_waits_for_its_shards_and_says_so(directory: Path) -> None:
    config, checkpoint = config_of(directory, kv_share=KV_SHARE), Checkpoint.open(directory)
    router = create(RemoteRouter, router_specs(config, checkpoint)[0])
    waiting = ", waiting for shard-0: there is no such actor; shard-1: there is no such actor"
    wait_until(lambda: state_of(router).summary.endswith(waiting))
    assert (state_of(router).phase, router_stats().engine) == (Phase.LOADING, None)
    with pytest.raises(launch.StartError, match=r"\(start_timeout_s\): router-0 is loading, .*, waiting for shard-0"):
        launch._wait_for_weights({"router-0": router}, Silent(), time.monotonic() + 1.0)

    for spec in shard_specs(config, checkpoint):
        create(RemoteShard, spec)
    wait_until(lambda: state_of(router).summary == "ready")
    engine = router_stats().engine
    assert engine is not None
    assert 0 < engine.kv_bytes_total <= KV_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_with_bytes_it_waits_for_nobody(directory: Path) -> None:
    config = config_of(directory, kv_bytes=2**20)
    router = create(RemoteRouter, router_specs(config, Checkpoint.open(directory))[0])
    wait_until(lambda: state_of(router).phase is Phase.READY)

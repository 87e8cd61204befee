"""A real deployment on a local Ray, for tests: tiny checkpoint, free ports, everything else as users get it."""

import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from cluster import launch, ray_runtime, teardown
from cluster.config import DeploymentConfig, parse_deployment
from cluster.free_ports import free_ports
from cluster.reports import ActorState, RouterStats
from tests.loopback import PATIENCE_S

NAMESPACE = "drover-test"


class Silent:
    """A start's progress that nobody watches."""

    def stage(self, text: str) -> None:
        pass

    def loading(self, name: str, state: ActorState | None) -> None:
        pass


def deployment_config(checkpoint: Path, **changes: Any) -> DeploymentConfig:
    """Defaults but for ports, and CPUs small enough for any number of shards. changes: whole sections."""
    grpc_port, http_port = free_ports(2)
    raw: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "ray": {"namespace": NAMESPACE, "num_cpus": 2},
        "router": {"cpus": 0.5},
        "shards": {"count": 2, "cpus": 0.1},
        # Ten processes share two cores in these tests; a shard's heart may miss some beats.
        "links": {"dead_after_ms": 3000},
        "frontend": {"grpc_port": grpc_port, "http_port": http_port},
    }
    return parse_deployment(raw | changes)


@contextmanager
def running(config: DeploymentConfig) -> Iterator[launch.Deployment]:
    """Start a deployment on this process's local Ray, and remove it; the Ray stays for the next one."""
    try:
        yield launch.start(config, Silent())
    finally:
        teardown.stop(config.ray.namespace)


@contextmanager
def local_ray() -> Iterator[None]:
    """Ends the local Ray that deployments in the block have started."""
    try:
        yield
    finally:
        ray_runtime.disconnect()


def http_get(deployment: launch.Deployment, path: str) -> tuple[int, str, str]:
    """Status, content type and text of a GET on the HTTP port."""
    frontend = deployment.config.frontend
    try:
        with urllib.request.urlopen(f"http://{frontend.host}:{frontend.http_port}{path}", timeout=PATIENCE_S) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read().decode()


def actor(name: str) -> Any:
    return ray.get_actor(name, namespace=NAMESPACE)


def pid_of(name: str) -> int:
    state: ActorState = ray.get(actor(name).state.remote(), timeout=30)
    return state.pid


def router_stats() -> RouterStats:
    stats: RouterStats = ray.get(actor("router-0").stats.remote(), timeout=30)
    return stats

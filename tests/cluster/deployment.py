"""Real deployments on a local Ray, for tests: tiny checkpoints, free ports, everything else as users get it."""

import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import ray

from cluster import launch, ray_runtime, teardown
from cluster.config import DeploymentConfig, parse_deployment
from cluster.free_ports import free_ports
from cluster.names import app_name
from cluster.reports import ActorState, RouterStats
from tests.processes import PATIENCE_S

NAMESPACE = "drover-test"
# One GPU is only claimed, so that a test can ask for a GPU that is not there.
RAY = {"namespace": NAMESPACE, "num_cpus": 2, "num_gpus": 1}


# What several modules are served by, one after the other: test_process_faults.py, test_reference_tokens.py,
# test_service.py. Models of `reference_of`, and what their deployments change. Prompts are computed in pieces.
# Other tests serve on 1 shard (test_detached.py) and on 5 (test_embedded_model.py).
KV_SHARE = 0.01
MAVERICK: tuple[str, dict[str, Any]] = (
    "maverick",
    {"shards": {"count": 2, "cpus": 0.1}, "engine": {"max_step_tokens": 24, "max_running": 8, "kv_share": KV_SHARE}},
)
MAX_CONTEXT = 500
SCOUT: tuple[str, dict[str, Any]] = (
    "scout-top-2",
    {
        "model_name": "tiny-scout",
        "shards": {"count": 3, "cpus": 0.1},
        "engine": {
            "max_context_tokens": MAX_CONTEXT,
            "max_step_tokens": 24,
            "max_running": 4,
            "max_waiting": 12,
            # 128 bytes per layer and position; n tokens keep n in one layer, at most 16 in the other three.
            "kv_bytes": 128 * (400 + 3 * 16),
        },
        "frontend": {"grace_s": 2.0},  # short, so that a test may wait for it
    },
)


class Silent:
    """A start's progress that nobody watches."""

    def stage(self, text: str) -> None:
        pass

    def loading(self, name: str, state: ActorState | None) -> None:
        pass


def deployment_config(checkpoint: Path, **changes: Any) -> DeploymentConfig:
    """Defaults, but for ports, CPUs small enough for any number of shards, and a longer links.dead_after_ms.

    changes: whole sections, but `frontend` keeps the free ports unless it names others.
    """
    grpc_port, http_port = free_ports(2)
    ports = {"grpc_port": grpc_port, "http_port": http_port}
    raw: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "ray": RAY,
        "router": {"cpus": 0.5},
        "shards": {"count": 2, "cpus": 0.1},
        # Ten processes share two cores in these tests; a shard's heart may miss some beats.
        "links": {"dead_after_ms": 3000},
        "autoscale": {"paused": True},
        "admin": {"port": 0},
    }
    return parse_deployment(raw | changes | {"frontend": ports | changes.get("frontend", {})})


class SharedRay:
    """The local Ray of all tests that need no Ray of their own, and the one deployment that runs there at a time."""

    def __init__(self) -> None:
        ray_runtime.connect(parse_deployment({"checkpoint": "none", "ray": RAY}).ray)
        self._asked: object = None
        self._deployment: launch.Deployment | None = None

    def serve(self, checkpoint: Path, **changes: Any) -> launch.Deployment:
        """A deployment of `deployment_config`'s: the running one, if the same was asked for, or else a new one."""
        asked = (checkpoint, changes)
        if self._deployment is None or asked != self._asked:
            self.clear()
            self._deployment, self._asked = launch.start(deployment_config(checkpoint, **changes), Silent()), asked
        return self._deployment

    def clear(self) -> None:
        """Remove whatever runs, also what a failed start has left."""
        teardown.stop(NAMESPACE)
        self._deployment = None


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
    state: ActorState = ray.get(actor(name).state.remote(), timeout=PATIENCE_S)
    return state.pid


def router_stats() -> RouterStats:
    stats: RouterStats = ray.get(actor("router-0").stats.remote(), timeout=PATIENCE_S)
    return stats


def replica_pids() -> list[int]:
    """The frontend replicas' processes on this process's Ray. The machine may run those of others, too."""
    replicas = f"SERVE_REPLICA::{app_name(NAMESPACE)}#"
    actors = ray._private.state.actors().values()
    return [actor["Pid"] for actor in actors if actor["Name"].startswith(replicas) and actor["State"] == "ALIVE"]

"""Ray's autoscaler adds a node for a new shard, and takes it away once the shard is gone.

The nodes are processes on this machine, as Ray's own tests of its autoscaler have them.
"""

import json
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from client import Client
from cluster import ray_runtime
from cluster.free_ports import free_ports
from tests.cluster.commands import MARK, NAMESPACE, START_S, address_in, marked_environment, write_deployment_file
from tests.command import Screen, drover_process
from tests.processes import PATIENCE_S, processes_with, wait_until
from tests.reference import Reference, prompt

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

HEAD, HEAD_CPUS = "ray.head.default", 1
HEAD_ID = FAKE_HEAD_NODE_ID
PARTS = ("--set", "router.cpus=0.4", "--set", "shards.cpus=0.3")  # the head has no room for a third shard
TOKENS = 24
UNUSED = (  # by nodes that are processes; Ray wants them all the same
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "cluster_synced_files",
    "rsync_exclude",
    "rsync_filter",
)


@dataclass(frozen=True)
class GrowingRay:
    """A Ray cluster whose autoscaler may add nodes of one CPU."""

    address: str
    environment: dict[str, str]

    @property
    def nodes(self) -> int:
        commands = processes_with(f"{MARK}={self.environment[MARK]}").values()
        return sum("/raylet/raylet " in command for command in commands)


def autoscaling(address: str) -> dict[str, object]:
    return {
        "cluster_name": "growing",
        "provider": {
            # As "fake_multinode" is; but Ray's wheel lacks the file that goes with that name.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address,
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
        },
        "max_workers": 2,
        "idle_timeout_minutes": 0.05,
        "upscaling_speed": 1.0,
        "head_node_type": HEAD,
        "available_node_types": {
            HEAD: {"resources": {"CPU": HEAD_CPUS}, "node_config": {}, "max_workers": 0},
            "one-cpu": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        "auth": {},
        "docker": {},
        "file_mounts": {},
        **{key: [] for key in UNUSED},
        "file_mounts_sync_continuously": False,
    }


@pytest.fixture(scope="module")
def growing_ray() -> Iterator[GrowingRay]:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex, "RAY_SERVE_ENABLE_HA_PROXY": "1"}
    fake = {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_NODE_TYPE_NAME": HEAD,  # as KubeRay and `ray up` set it
    }
    with (
        marked_environment() as marked,
        tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder,
    ):
        environment = marked | token | ray_runtime._serve_ports()  # not those of this process's own Ray
        address = f"127.0.0.1:{free_ports(1)[0]}"
        config = Path(folder) / "autoscaling.yaml"
        config.write_text(yaml.safe_dump(autoscaling(address)))
        where = [f"--port={address.partition(':')[2]}", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}"]
        options = [f"--num-cpus={HEAD_CPUS}", f"--autoscaling-config={config}", "--include-dashboard=false"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", *where, *options]
        command += ["--disable-usage-stats", "--object-store-memory=80000000", "--block"]
        with subprocess.Popen(
            command, env=environment | fake, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            assert process.stdout is not None
            Screen(process.stdout.fileno()).read_until(b"--block", START_S)
            try:
                yield GrowingRay(address, environment)
            finally:
                process.terminate()
                process.wait(START_S)


@pytest.fixture(scope="module")
def reference(reference_of: Callable[[str], Reference]) -> Reference:
    return reference_of("maverick")


def test_a_node_is_asked_for_used_emptied_and_released(
    growing_ray: GrowingRay, reference: Reference, tmp_path: Path
) -> None:
    file = write_deployment_file(tmp_path / "deployment.yaml", reference.directory)
    on_cluster = ("--ray-address", growing_ray.address, "--namespace", NAMESPACE)

    def drover(*arguments: str | Path) -> str:
        done = drover_process(*arguments, env=growing_ray.environment, timeout_s=START_S)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def answers_right() -> None:
        with Client(address_in(file)) as client:
            stream = client.generate(list(prompt(9)), max_tokens=TOKENS, temperature=0, timeout_s=PATIENCE_S)
            token_ids = [token_id for delta in stream for token_id in delta.token_ids]
        assert token_ids == reference.greedy(list(prompt(9)), TOKENS)[0]

    drover("serve", file, "--set", f"ray.address={growing_ray.address}", *PARTS, "--detach")
    assert growing_ray.nodes == 1
    drover("resize", "--shards", "3", *on_cluster)
    assert growing_ray.nodes == 2
    shards = json.loads(drover("status", "--json", *on_cluster))["shards"]
    assert [shard["phase"] for shard in shards] == ["ready"] * 3
    answers_right()
    drover("resize", "--shards", "2", *on_cluster)
    wait_until(lambda: growing_ray.nodes == 1, START_S)
    answers_right()
    drover("stop", *on_cluster)

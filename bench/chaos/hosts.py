"""Several Ray nodes on this machine, each on a host of a network of namespaces. Needs root."""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

from bench.chaos.network import Network
from bench.errors import BenchError
from bench.process import ROOT
from cluster.actors.failpoints import VARIABLE

RAY_PORT = 6379
START_S = 120.0
ROUTER_CPUS, SHARD_CPUS, SHARDS_PER_NODE = 12, 3, 3
"""So that routers fit the head alone, which they fill, and a lost node's shards fit the others."""
OBJECT_STORE_BYTES = 80 * 10**6


class Hosts:
    """A head node, number 0, and nodes with room for three shards each. Use it in a `with` block. Raises BenchError."""

    def __init__(self, count: int, routers: int) -> None:
        self._cpus = [routers * ROUTER_CPUS, *[SHARDS_PER_NODE * SHARD_CPUS] * (count - 1)]
        # A short path: sockets of Ray and HAProxy are in it.
        self.folder = Path(tempfile.mkdtemp(prefix="dc-", dir="/tmp"))
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(24),
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            # The head keeps its records on disk, so that it can be started again.
            "RAY_gcs_storage": "rocksdb",
            "RAY_gcs_storage_path": str(self.folder / "gcs"),
            # Ray's own detector of lost nodes takes 15 s.
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_timeout_ms": "2000",
            "RAY_health_check_failure_threshold": "4",
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
            "RAY_raylet_start_wait_time_s": "120",
            "PYTHONPATH": str(ROOT),
        }
        (self.folder / "gcs").mkdir()
        self.network = Network(count)

    @property
    def ray_address(self) -> str:
        return f"{self.network.address(0)}:{RAY_PORT}"

    def __enter__(self) -> "Hosts":
        try:
            self.network.__enter__()
            for host in range(self.network.count):
                self.start_node(host)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process on the hosts, and remove the hosts."""
        self.network.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_node(self, host: int) -> None:
        """Start Ray on a host: the head on number 0."""
        command = [
            str(Path(sys.executable).parent / "ray"), "start", f"--node-ip-address={self.network.address(host)}",
            "--disable-usage-stats", f"--temp-dir={self.folder}", f"--object-store-memory={OBJECT_STORE_BYTES}",
            f"--num-cpus={self._cpus[host]}",
        ]  # fmt: skip
        if host:
            command += [f"--address={self.ray_address}"]
        else:
            command += ["--head", f"--port={RAY_PORT}", "--include-dashboard=false"]
        environment = os.environ | self.environment | {VARIABLE: str(self.folder)}
        done = subprocess.run(
            self.network.inside(host, command),
            env=environment,
            cwd=ROOT,
            timeout=START_S,
            capture_output=True,
            check=False,
        )
        if done.returncode:
            raise BenchError(f"Ray did not start on host {host}: {done.stderr.decode(errors='replace').strip()[-500:]}")

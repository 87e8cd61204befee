"""The deployment under test: started with failpoints on, its processes found, ended with everything that it had."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from bench.chaos.hosts import ROUTER_CPUS, SHARD_CPUS, Hosts
from bench.chaos.processes import Process, has_mark, lives, processes, send
from bench.drover_server import wait_until_served
from bench.errors import BenchError
from bench.process import ROOT, end
from cluster.actors.failpoints import VARIABLE
from cluster.config import DeploymentConfig, parse_deployment
from cluster.free_ports import free_ports
from cluster.names import app_name

GATHER_S = 60.0


@dataclass(frozen=True)
class Shape:
    """How many of each part, and the threads that one of them computes with."""

    shards: int = 5
    replicas: int = 2
    routers: int = 2
    frontends: int = 2
    router_threads: int = 2
    shard_threads: int = 1
    heal_s: float = 60.0

    def __str__(self) -> str:
        return (
            f"{self.shards} shards, every expert on {self.replicas}, {self.routers} routers, "
            f"{self.frontends} frontend replicas"
        )


class System:
    """A deployment on a Ray of its own, or on hosts of this machine. Use it in a `with` block. Raises BenchError.

    folder: private to one run. Failpoint files, logs and the deployment file are in it.
    """

    def __init__(
        self, checkpoint: Path, shape: Shape, work: Path, hosts: Hosts | None = None, tmpdir: str = ""
    ) -> None:
        """hosts: nodes that run already. tmpdir: where Ray's logs go; default: as always."""
        self.checkpoint, self.shape, self.hosts = checkpoint, shape, hosts
        self.namespace = f"chaos-{os.getpid()}"
        self.folder = Path(tempfile.mkdtemp(prefix="run-", dir=work)) if hosts is None else hosts.folder
        self._work, self._tmpdir = work, tmpdir
        self._process: subprocess.Popen[bytes] | None = None
        self._ports = free_ports(2)
        self.config = self._config()

    @property
    def address(self) -> str:
        return f"{self._host}:{self._ports[0]}"

    @property
    def metrics_url(self) -> str:
        return f"http://{self._host}:{self._ports[1]}/metrics"

    @property
    def log(self) -> Path:
        return self._work / "chaos-serve.log"

    def __enter__(self) -> "System":
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start it, also after it has ended, and return once it serves."""
        file = self.folder / "drover.yaml"
        content = self.config.model_dump(mode="json", exclude_none=True)
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        for old in (*self.folder.glob("*.pid"), *self.folder.glob("*.hit")):
            old.unlink()
        command = [sys.executable, "-m", "cli.main", "serve", str(file)]
        if self.hosts is not None:
            command = self.hosts.network.inside(0, [*command, "--detach"])
        environment = os.environ | {VARIABLE: str(self.folder)} | (self.hosts.environment if self.hosts else {})
        if self._tmpdir:
            environment["TMPDIR"] = self._tmpdir
        with self.log.open("ab") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )
        wait_until_served(self._process, self.log)
        self._gather_frontends()

    def restart_if_ended(self) -> bool:
        """Start it again if it has ended as a whole; whether it had."""
        if self.hosts is not None or self._process is None or self._process.poll() is None:
            return False
        end(self._process)
        self.start()
        return True

    def close(self) -> None:
        """End it, with everything that it has started, and remove its folder."""
        try:
            if self._process is not None:
                end(self._process, signal.SIGINT)
        finally:
            if self.hosts is None:
                shutil.rmtree(self.folder, ignore_errors=True)

    def actors(self) -> dict[str, int]:
        """Process ids of the routers, shards and the controller that live, by name."""
        found = {}
        for file in self.folder.glob("*.pid"):
            text = file.read_text()
            if text.isdigit() and lives(int(text)):
                found[file.stem] = int(text)
        return found

    def of_kind(self, kind: str) -> list[int]:
        """Process ids of all "frontend", "haproxy", "gcs_server" or "raylet" of this deployment."""
        return self._of_kind(kind, list(processes()))

    def everything(self) -> dict[str, list[int]]:
        """Process ids of every part, by name; what there are several of has one name."""
        kinds = ("frontend", "haproxy", "gcs_server", "raylet")
        running = list(processes())
        return {name: [pid] for name, pid in self.actors().items()} | {
            kind: self._of_kind(kind, running) for kind in kinds
        }

    def _of_kind(self, kind: str, running: Sequence[Process]) -> list[int]:
        if kind == "frontend":
            title = f"ray::ServeReplica:{app_name(self.namespace)}"
            return [process.pid for process in running if process.title.startswith(title)]
        mark = f"{VARIABLE}={self.folder}"
        return [p.pid for p in running if p.command.startswith(kind) and has_mark(p.pid, mark)]

    def replicas_of(self) -> list[frozenset[int]]:
        """For each slot, the numbers of the shards that hold it. To be asked before a shard has moved."""
        from checkpoint.tensors import Checkpoint
        from cluster.actors.specs import shard_specs

        nodes = None
        if self.hosts is not None:
            pids, network = self.actors(), self.hosts.network
            nodes = [str(network.host_of(pids[f"shard-{number}"])) for number in range(self.shape.shards)]
        holders: dict[Any, set[int]] = {}
        for number, spec in enumerate(shard_specs(self.config, Checkpoint.open(self.checkpoint), nodes)):
            for slot in spec.slots:
                holders.setdefault(slot, set()).add(number)
        return sorted({frozenset(shards) for shards in holders.values()}, key=sorted)

    def _gather_frontends(self) -> None:
        """On hosts: end replicas until all run on the head, so that a host that is cut off is no frontend."""
        deadline_s = time.monotonic() + GATHER_S
        while self.hosts is not None and time.monotonic() < deadline_s:
            replicas = self.of_kind("frontend")
            elsewhere = [pid for pid in replicas if self.hosts.network.host_of(pid) != 0]
            if len(replicas) == self.shape.frontends and not elsewhere:
                return
            for pid in elsewhere[:1]:
                send(pid, signal.SIGKILL)
            time.sleep(1.0)  # Ray Serve starts another one where it likes

    @property
    def _host(self) -> str:
        return "127.0.0.1" if self.hosts is None else self.hosts.network.address(0)

    def _config(self) -> DeploymentConfig:
        shape = self.shape
        on_hosts = self.hosts is not None
        ray: Mapping[str, Any] = {"namespace": self.namespace, "num_cpus": 4}
        if self.hosts is not None:
            ray = {"namespace": self.namespace, "address": self.hosts.ray_address}
        try:
            return parse_deployment(
                {
                    "checkpoint": str(self.checkpoint),
                    "heal_s": shape.heal_s,
                    "ray": ray,
                    "router": {
                        "count": shape.routers,
                        "cpus": float(ROUTER_CPUS) if on_hosts else 0.5,
                        "threads": shape.router_threads,
                    },
                    "shards": {
                        "count": shape.shards,
                        "cpus": float(SHARD_CPUS) if on_hosts else 0.1,
                        "threads": shape.shard_threads,
                    },
                    "placement": {"replicas": shape.replicas},
                    "frontend": {
                        "host": "0.0.0.0" if on_hosts else self._host,
                        "grpc_port": self._ports[0],
                        "http_port": self._ports[1],
                        "replicas": shape.frontends,
                    },
                }
            )
        except ValueError as error:
            raise BenchError(str(error)) from None


def secret() -> str:
    """A token for a Ray cluster of our own."""
    return secrets.token_hex(24)

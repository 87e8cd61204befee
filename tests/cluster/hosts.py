"""Several Ray nodes on this machine, each in a network namespace with an address of its own. Needs root."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tests.cluster.commands import START_S
from tests.command import DROVER, ROOT
from tests.processes import PATIENCE_S, wait_until

RAY_PORT, GRPC_PORT = 6379, 9000


def missing() -> str:
    """Why there can be no namespaces here; empty if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need `ip`, from iproute2"
    name = f"dtprobe{os.getpid() % 10000}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "this kernel or container makes no network namespaces"
    subprocess.run(["ip", "netns", "del", name], check=False)
    return ""


class Hosts:
    """A head node, number 0, and workers. The head keeps its records on disk, so that it can be started again."""

    def __init__(self, cpus: Sequence[float], **environment: str) -> None:
        """cpus: of each host, the head first."""
        self._cpus = cpus
        self._tag, self._subnet = f"dt{os.getpid() % 10000}", f"10.79.{os.getpid() % 250}"
        self.folder = Path(tempfile.mkdtemp(prefix="hosts-", dir="/tmp"))
        (self.folder / "gcs").mkdir()
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": uuid.uuid4().hex,
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_gcs_storage": "rocksdb",
            "RAY_gcs_storage_path": str(self.folder / "gcs"),
            "PYTHONPATH": str(ROOT),
        } | environment  # fmt: skip

    def address(self, host: int) -> str:
        return f"{self._subnet}.{host + 1}"

    def grpc_address(self, host: int) -> str:
        return f"{self.address(host)}:{GRPC_PORT}"

    @property
    def ray_address(self) -> str:
        return f"{self.address(0)}:{RAY_PORT}"

    def run(self, host: int, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command on a host."""
        inside = ["ip", "netns", "exec", self._name(host), *command]
        return subprocess.run(
            inside, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=START_S, check=False
        )

    def drover(self, host: int, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run(host, *DROVER, *arguments)

    def start(self, host: int) -> None:
        """Start Ray there."""
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--node-ip-address={self.address(host)}"]
        ray += [f"--num-cpus={self._cpus[host]}", f"--temp-dir={self.folder}", "--disable-usage-stats"]
        ray += ["--object-store-memory=80000000"]
        # Hosts see each other's processes, and share this file: a head would find the one before still there.
        (self.folder / "ray_current_cluster").unlink(missing_ok=True)
        head = ["--head", f"--port={RAY_PORT}", "--include-dashboard=false"]
        done = self.run(host, *ray, *([f"--address={self.ray_address}"] if host else head))
        assert done.returncode == 0, done.stderr[-2000:]

    def pids(self, host: int) -> list[int]:
        told = subprocess.run(["ip", "netns", "pids", self._name(host)], capture_output=True, text=True, check=False)
        return [int(pid) for pid in told.stdout.split()]

    def kill(self, host: int) -> None:
        """End every process there at once, as when the machine loses its power."""

        def nothing_runs() -> bool:
            pids = self.pids(host)
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not pids

        wait_until(nothing_runs, PATIENCE_S)

    def __enter__(self) -> "Hosts":
        try:
            bridge = f"{self._tag}br"
            self._ip(f"link add {bridge} type bridge")
            self._ip(f"addr add {self._subnet}.254/24 dev {bridge}")
            self._ip(f"link set {bridge} up")
            for host in range(len(self._cpus)):
                name, cable = self._name(host), f"{self._tag}v{host}"
                self._ip(f"netns add {name}")
                self._ip(f"link add {cable} type veth peer name e0 netns {name}")
                self._ip(f"link set {cable} master {bridge} up")
                self._ip(f"-n {name} addr add {self.address(host)}/24 dev e0")
                self._ip(f"-n {name} link set e0 up")
                self._ip(f"-n {name} link set lo up")
            for host in range(len(self._cpus)):
                self.start(host)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in range(len(self._cpus)):
            self.kill(host)
            subprocess.run(["ip", "netns", "del", self._name(host)], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", f"{self._tag}br"], capture_output=True, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _name(self, host: int) -> str:
        return f"{self._tag}h{host}"

    def _ip(self, arguments: str) -> None:
        subprocess.run(["ip", *arguments.split()], check=True, capture_output=True)

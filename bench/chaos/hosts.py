"""Several Ray nodes on this machine, each in a network namespace of its own, joined by a bridge. Needs root.

Each node has an address of its own, and its traffic can be cut one way or both, slowed, or dropped.
The kernel drops what a node sends at its end of a virtual cable, and what it would receive at the
bridge's end. Only namespaces and devices that this module made are touched.
"""

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from bench.errors import BenchError
from bench.process import ROOT
from cluster.actors.failpoints import VARIABLE

SUBNET = f"10.77.{os.getpid() % 250}"
RAY_PORT = 6379
START_S, END_S = 120.0, 20.0
HEAD_CPUS, NODE_CPUS = 16, 6
OBJECT_STORE_BYTES = 80 * 10**6
SEND, RECEIVE = "send", "receive"
# A queue that holds nothing drops everything.
CUT = ("pfifo", "limit", "0")
DELAYS = (("netem", "delay", "20ms", "10ms"), ("tbf", "rate", "8mbit", "burst", "6000", "limit", "400000"))
DROPS = (("netem", "loss", "10%"), ("tbf", "rate", "16mbit", "burst", "6000", "limit", "6000"))
"""What a kernel may have, best first. Without netem, a slow cable delays, and one with a short queue drops."""


def missing() -> str:
    """Why hosts cannot be made here; empty if they can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root: run it as `sudo make chaos`, or in a container with CAP_SYS_ADMIN"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"`{tool}` is not installed; it is in Debian's package iproute2"
    name = f"dcprobe{os.getpid() % 10000}"
    if _run("ip", "netns", "add", name).returncode:
        return "this kernel or container makes no network namespaces (`ip netns add` failed)"
    try:
        if _run("ip", "link", "add", name, "type", "veth", "peer", "name", "e0", "netns", name).returncode:
            return "this kernel has no veth devices (`ip link add type veth` failed)"
    finally:
        _run("ip", "netns", "del", name)
    return ""


class Hosts:
    """A head node, number 0, and nodes with room for two shards each. Use it in a `with` block. Raises BenchError."""

    def __init__(self, count: int) -> None:
        self.count = count
        # A short path: sockets of Ray and HAProxy are in it.
        self.folder = Path(tempfile.mkdtemp(prefix="dc-", dir="/tmp"))
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(24),
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(self.folder / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(self.folder / "a.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(self.folder / "server-state"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(self.folder),
            "PYTHONPATH": str(ROOT),
        }
        self._tag = f"dc{os.getpid() % 10000}"
        self._delay: tuple[str, ...] = ()
        self._drop: tuple[str, ...] = ()

    @property
    def ray_address(self) -> str:
        return f"{self.address(0)}:{RAY_PORT}"

    def address(self, host: int) -> str:
        return f"{SUBNET}.{host + 1}"

    def inside(self, host: int, command: Sequence[str]) -> list[str]:
        """The command line that runs a command on a host."""
        return ["ip", "netns", "exec", self._name(host), *command]

    def __enter__(self) -> "Hosts":
        try:
            self._make_network()
            for host in range(self.count):
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
        for host in range(self.count):
            self.kill_all(host)
            _run("ip", "netns", "del", self._name(host))
        _run("ip", "link", "del", f"{self._tag}br")
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_node(self, host: int) -> None:
        """Start Ray on a host: the head on number 0."""
        command = [
            str(Path(sys.executable).parent / "ray"), "start", f"--node-ip-address={self.address(host)}",
            "--disable-usage-stats", f"--object-store-memory={OBJECT_STORE_BYTES}",
            f"--num-cpus={NODE_CPUS if host else HEAD_CPUS}",
        ]  # fmt: skip
        if host:
            command += [f"--address={self.ray_address}"]
        else:
            temporary = f"--temp-dir={self.folder / 'ray'}"
            command += ["--head", f"--port={RAY_PORT}", "--include-dashboard=false", temporary]
        environment = os.environ | self.environment | {VARIABLE: str(self.folder)}
        done = subprocess.run(
            self.inside(host, command), env=environment, cwd=ROOT, timeout=START_S, capture_output=True, check=False
        )
        if done.returncode:
            raise BenchError(f"Ray did not start on host {host}: {done.stderr.decode(errors='replace').strip()[-500:]}")

    def processes(self, host: int) -> list[int]:
        return [int(pid) for pid in _run("ip", "netns", "pids", self._name(host)).stdout.split()]

    def host_of(self, pid: int) -> int | None:
        """The host on which a process runs."""
        try:
            mine = os.stat(f"/proc/{pid}/ns/net").st_ino
            return next(h for h in range(self.count) if os.stat(f"/run/netns/{self._name(h)}").st_ino == mine)
        except (OSError, StopIteration):
            return None

    def kill_all(self, host: int) -> None:
        """SIGKILL every process on a host, and those that they still start."""
        deadline_s = time.monotonic() + END_S
        while (pids := self.processes(host)) and time.monotonic() < deadline_s:
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.05)  # Linux tells of children only

    def cut(self, host: int, *directions: str) -> None:
        """Drop every packet that the host sends, or would receive."""
        for direction in directions:
            self._shape(host, direction, CUT)

    def delay(self, host: int) -> None:
        self._best(host, (SEND,), DELAYS)

    def drop(self, host: int) -> None:
        self._best(host, (SEND, RECEIVE), DROPS)

    def heal(self, host: int) -> int:
        """Let all packets pass again; returns how many were dropped or late meanwhile."""
        touched = 0
        for direction in (SEND, RECEIVE):
            where = self._cable(host, direction)
            told = _run(*where[0], "-s", "qdisc", "show", "dev", where[1]).stdout
            numbers = re.search(r"dropped (\d+), overlimits (\d+)", told)
            touched += sum(map(int, numbers.groups())) if numbers else 0
            _run(*where[0], "qdisc", "del", "dev", where[1], "root")
        return touched

    def _best(self, host: int, directions: Sequence[str], ways: Sequence[Sequence[str]]) -> None:
        for direction in directions:
            if not any(self._try(host, direction, way) for way in ways):
                raise BenchError(f"this kernel's traffic control knows none of {', '.join(way[0] for way in ways)}")

    def _shape(self, host: int, direction: str, way: Sequence[str]) -> None:
        if not self._try(host, direction, way):
            raise BenchError(f"`tc qdisc` cannot {' '.join(way)} on host {host}")

    def _try(self, host: int, direction: str, way: Sequence[str]) -> bool:
        tc, device = self._cable(host, direction)
        return _run(*tc, "qdisc", "replace", "dev", device, "root", *way).returncode == 0

    def _cable(self, host: int, direction: str) -> tuple[list[str], str]:
        """(tc on the right side, the device whose queue the packets of this direction leave)."""
        if direction == SEND:
            return ["tc", "-n", self._name(host)], "e0"
        return ["tc"], f"{self._tag}v{host}"

    def _name(self, host: int) -> str:
        return f"{self._tag}h{host}"

    def _make_network(self) -> None:
        bridge = f"{self._tag}br"
        _must("ip", "link", "add", bridge, "type", "bridge")
        _must("ip", "addr", "add", f"{SUBNET}.254/24", "dev", bridge)
        _must("ip", "link", "set", bridge, "up")
        for host in range(self.count):
            name, cable = self._name(host), f"{self._tag}v{host}"
            _must("ip", "netns", "add", name)
            _must("ip", "link", "add", cable, "type", "veth", "peer", "name", "e0", "netns", name)
            _must("ip", "link", "set", cable, "master", bridge, "up")
            _must("ip", "-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "e0")
            for device in ("e0", "lo"):
                _must("ip", "-n", name, "link", "set", device, "up")


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _must(*command: str) -> None:
    done = _run(*command)
    if done.returncode:
        raise BenchError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")

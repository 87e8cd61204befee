"""Network namespaces joined by a bridge, each with an address of its own, as if they were hosts. Needs root.

A host's traffic can be cut one way or both, delayed, or lost. The kernel drops what a host sends at
its end of a virtual cable, and what it would receive at the bridge's end. Only namespaces and
devices that this module made are touched.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType

from bench.errors import BenchError
from bench.process import ROOT, end

SUBNET = f"10.77.{os.getpid() % 250}"
END_S = 20.0
SEND, RECEIVE = "send", "receive"
# A queue that holds nothing drops everything.
CUT = ("pfifo", "limit", "0")
LATE = ("15", "10", "0")
LOSSY = ("0", "0", "0.1")
"""Of a bad cable, see bad_cable.py: each way 15 to 25 ms late, or every tenth frame lost."""


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


class Network:
    """Hosts, numbered from 0. Use it in a `with` block. Raises BenchError."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._tag = f"dc{os.getpid() % 10000}"
        self._bad: dict[int, subprocess.Popen[str]] = {}
        """Of hosts behind a bad cable: the process that is it."""

    def __enter__(self) -> "Network":
        try:
            self._make()
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
        for process in self._bad.values():
            end(process)
        for host in range(self.count):
            _run("ip", "link", "del", f"{self._tag}n{host}")
            self.kill_all(host)
            _run("ip", "netns", "del", self._name(host))
        _run("ip", "link", "del", f"{self._tag}br")

    def address(self, host: int) -> str:
        return f"{SUBNET}.{host + 1}"

    def inside(self, host: int, command: Sequence[str]) -> list[str]:
        """The command line that runs a command on a host."""
        return ["ip", "netns", "exec", self._name(host), *command]

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
            tc, device = self._cable(host, direction)
            _must(*tc, "qdisc", "replace", "dev", device, "root", *CUT)

    def replace_cable(self, host: int, quality: Sequence[str]) -> None:
        """Put a bad cable between the host and the bridge. quality: LATE or LOSSY."""
        cable, near, far = (f"{self._tag}{kind}{host}" for kind in "vnf")
        _must("ip", "link", "add", near, "type", "veth", "peer", "name", far)
        _must("ip", "link", "set", far, "master", f"{self._tag}br", "up")
        _must("ip", "link", "set", near, "up", "promisc", "on")
        _must("ip", "link", "set", cable, "nomaster", "promisc", "on")
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.chaos.bad_cable", cable, near, *quality],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
        )  # fmt: skip
        self._bad[host] = process
        assert process.stdout is not None
        if process.stdout.readline() != "up\n":
            raise BenchError("frames cannot be forwarded: this kernel or container has no packet sockets")

    def heal(self, host: int) -> int:
        """Let all packets pass again; returns how many frames a bad cable has lost or delayed."""
        if host in self._bad:
            return self._mend_cable(host)
        for direction in (SEND, RECEIVE):
            tc, device = self._cable(host, direction)
            _run(*tc, "qdisc", "del", "dev", device, "root")
        return 0

    def _mend_cable(self, host: int) -> int:
        process, cable = self._bad.pop(host), f"{self._tag}v{host}"
        told, _ = process.communicate(timeout=END_S)
        _run("ip", "link", "del", f"{self._tag}n{host}")
        _run("ip", "link", "set", cable, "promisc", "off")
        _must("ip", "link", "set", cable, "master", f"{self._tag}br")
        return sum(map(int, told.split()))

    def _cable(self, host: int, direction: str) -> tuple[list[str], str]:
        """(tc on the right side, the device whose queue the packets of this direction leave)."""
        if direction == SEND:
            return ["tc", "-n", self._name(host)], "e0"
        return ["tc"], f"{self._tag}v{host}"

    def _name(self, host: int) -> str:
        return f"{self._tag}h{host}"

    def _make(self) -> None:
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

"""Doing it: from a fault of the schedule to signals, failpoint files, cut cables and damaged files, and back."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from bench.chaos.hosts import Hosts
from bench.chaos.network import LATE, LOSSY, RECEIVE, SEND, Network
from bench.chaos.processes import monotonic_of, send
from bench.chaos.schedule import AT_RANDOM, DRAIN, DURING_RESTART, Part
from bench.chaos.system import System
from bench.chaos.victims import Victims
from bench.errors import BenchError
from bench.process import ROOT

POINT_S = 8.0
"""A point that nothing passes for so long is given up: the fault then comes at random."""
RESTART_POINT_S = 30.0
KILL_WITHIN_S, RESIZED_WITHIN_S = 6.0, 180.0
SLOW_FACTOR = 100
LOOK_S = 0.01
IN_SHARD = ("compute", "computed")
_DISK_FILL = "filled-by-chaos"


@dataclass
class Injected:
    """A fault that has come. at_s: when, by time.monotonic. heal: takes it away, and returns proof of its harm."""

    victims: list[str]
    at_s: float
    point: str = AT_RANDOM
    uncovered: int = 0
    note: str = ""
    gone: list[int] = field(default_factory=list)
    """Processes that are dead now."""
    heal: Callable[[], dict[str, float]] = dict


class Injector:
    """Injects faults into one system. logs: the mount of its logs, for a full disk."""

    def __init__(self, system: System, logs: Path | None = None) -> None:
        self._system, self._logs = system, logs
        self._victims = Victims(system)

    def inject(self, part: Part) -> Injected:
        """Raises BenchError where the target is not there."""
        inject: Callable[[Part], Injected] = getattr(self, "_" + part.mode.replace("-", "_"))
        return inject(part)

    def _crash(self, part: Part) -> Injected:
        victims = self._victims.of(part)
        if part.point in DURING_RESTART:
            return self._crash_twice(part, victims)
        if part.point == DRAIN:
            return self._crash_amid_drain(part, victims)
        if part.point != AT_RANDOM:
            at_s = self._crash_at_point(part, victims)
            if at_s is not None:
                return self._crashed(victims, at_s, part.point)
        at_s = time.monotonic()
        for pid in victims.values():
            send(pid, signal.SIGKILL)
        note = "" if part.point == AT_RANDOM else f"nothing passed {part.point}"
        return self._crashed(victims, at_s, AT_RANDOM, note)

    def _crashed(self, victims: dict[str, int], at_s: float, point: str, note: str = "") -> Injected:
        return Injected(list(victims), at_s, point, self._victims.uncovered(victims), note, list(victims.values()))

    def _crash_at_point(self, part: Part, victims: dict[str, int]) -> float | None:
        """Let whoever passes the point next kill the victims; when it did, or None."""
        if part.target == "router" or part.point in IN_SHARD:
            passing = next(iter(victims))
        else:
            routers = sorted(name for name in self._system.actors() if name.startswith("router-"))
            passing = routers[int(part.draw * 7919) % len(routers)]
        itself_last = sorted(victims, key=lambda name: name == passing)
        action = "kill " + " ".join(f"{victims[name]} {int(signal.SIGKILL)}" for name in itself_last)
        return self._wait_for_hit(self._arm(passing, part.point, action), POINT_S)

    def _crash_amid_drain(self, part: Part, victims: dict[str, int]) -> Injected:
        """Drain the first victim, and kill all of them when a router is told so. Healing takes the drain back."""
        name = next(iter(victims))
        with self._drover("drain", name, "--grace-s", "5") as draining:
            at_s = self._crash_at_point(part, victims)
            draining.terminate()
            if at_s is None:
                at_s = time.monotonic()
                for pid in victims.values():
                    send(pid, signal.SIGKILL)
        crashed = self._crashed(victims, at_s, part.point)

        def heal() -> dict[str, float]:
            with self._drover("drain", "--undo", name) as undoing:
                undoing.wait(RESTART_POINT_S)
            return {}

        crashed.heal = heal
        return crashed

    def _drover(self, *arguments: str) -> "subprocess.Popen[bytes]":
        """A command about the system."""
        where = ["--namespace", self._system.namespace]
        command = [sys.executable, "-m", "cli.main", *arguments, *where]
        return subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def _crash_twice(self, part: Part, victims: dict[str, int]) -> Injected:
        """Kill at random, and each of its replacements once more at a point of its start."""
        files = [self._arm(name, part.point, f"kill self {int(signal.SIGKILL)}") for name in victims]
        at_s = time.monotonic()
        for pid in victims.values():
            send(pid, signal.SIGKILL)
        hits = [self._wait_for_hit(file, RESTART_POINT_S) for file in files]
        note = "" if all(hits) else f"nothing passed {part.point} a second time"
        return self._crashed(victims, at_s, part.point, note)

    def _stop(self, part: Part) -> Injected:
        victims = self._victims.of(part)
        at_s = time.monotonic()
        for pid in victims.values():
            send(pid, signal.SIGSTOP)

        def heal() -> dict[str, float]:
            for pid in victims.values():
                send(pid, signal.SIGCONT)
            return {}

        return Injected(list(victims), at_s, uncovered=self._victims.uncovered(victims), heal=heal)

    def _deadlock(self, part: Part) -> Injected:
        return self._while_a_file_is_there(part, "dispatch" if part.target == "router" else "compute", "block")

    def _slow(self, part: Part) -> Injected:
        return self._while_a_file_is_there(part, "compute", f"slow {SLOW_FACTOR}")

    def _while_a_file_is_there(self, part: Part, point: str, action: str) -> Injected:
        victims = self._victims.of(part)
        at_s = time.monotonic()
        files = [self._arm(name, point, action) for name in victims]

        def heal() -> dict[str, float]:
            for file in files:
                file.unlink(missing_ok=True)
            return {}

        return Injected(list(victims), at_s, point, self._victims.uncovered(victims), heal=heal)

    def _blackhole(self, part: Part) -> Injected:
        return self._on_hosts(part, lambda host: self._network.cut(host, SEND, RECEIVE))

    def _blackhole_send(self, part: Part) -> Injected:
        return self._on_hosts(part, lambda host: self._network.cut(host, SEND))

    def _blackhole_recv(self, part: Part) -> Injected:
        return self._on_hosts(part, lambda host: self._network.cut(host, RECEIVE))

    def _delay(self, part: Part) -> Injected:
        return self._on_hosts(part, lambda host: self._network.replace_cable(host, LATE), "frames late")

    def _drop(self, part: Part) -> Injected:
        return self._on_hosts(part, lambda host: self._network.replace_cable(host, LOSSY), "frames lost")

    def _on_hosts(self, part: Part, harm: Callable[[int], None], harm_name: str = "") -> Injected:
        hosts = {host for pid in self._victims.of(part).values() if (host := self._network.host_of(pid))}
        if not hosts:
            raise BenchError(f"{part.target} is on no host but the router's")
        uncovered, at_s = self._uncovered_on(hosts), time.monotonic()
        for host in sorted(hosts):
            harm(host)

        def heal() -> dict[str, float]:
            touched = sum([self._network.heal(host) for host in sorted(hosts)])
            return {harm_name: float(touched)} if harm_name else {}

        return Injected([f"host {host}" for host in sorted(hosts)], at_s, uncovered=uncovered, heal=heal)

    def _uncovered_on(self, hosts: Collection[int]) -> int:
        on = [name for name, pid in self._system.actors().items() if self._network.host_of(pid) in hosts]
        return self._victims.uncovered(on)

    def _node_loss(self, part: Part) -> Injected:
        used = {host for pid in self._system.actors().values() if (host := self._network.host_of(pid))}
        if not used:
            raise BenchError("no shard is on a host of its own")
        host = sorted(used)[int(part.draw * len(used))]
        pids, uncovered = self._network.processes(host), self._uncovered_on([host])
        at_s = time.monotonic()
        self._network.cut(host, SEND, RECEIVE)
        self._network.kill_all(host)

        def heal() -> dict[str, float]:
            self._network.heal(host)
            self._hosts.start_node(host)
            return {"node ended": 1.0}

        return Injected([f"host {host}"], at_s, uncovered=uncovered, gone=pids, heal=heal)

    def _head_loss(self, part: Part) -> Injected:
        if part.target == "controller":
            return self._crash(part)
        victims = self._victims.of(part)
        [pid] = victims.values()
        if part.target == "raylet":
            return self._raylet_loss(part, self._network.host_of(pid) or 0)
        restart = _again(pid)
        at_s = time.monotonic()
        send(pid, signal.SIGKILL)

        def heal() -> dict[str, float]:
            restart()
            return {"head ended": 1.0}

        return Injected(list(victims), at_s, gone=[pid], heal=heal)

    def _raylet_loss(self, part: Part, host: int) -> Injected:
        """Its workers end with it. Healing starts the node anew."""
        uncovered = self._uncovered_on([host])
        crashed = self._crash(part)
        crashed.uncovered = uncovered

        def heal() -> dict[str, float]:
            self._network.kill_all(host)
            self._hosts.start_node(host)
            return {"node ended": 1.0}

        crashed.heal = heal
        return crashed

    def _disk_full(self, part: Part) -> Injected:
        if self._logs is None:
            raise BenchError("no file system of its own for logs")
        file, refused = self._logs / _DISK_FILL, 0
        at_s = time.monotonic()
        with file.open("wb", buffering=0) as filling:
            try:
                while True:
                    filling.write(bytes(1 << 16))
            except OSError:
                refused += 1

        def heal() -> dict[str, float]:
            free = os.statvfs(file).f_bavail
            file.unlink(missing_ok=True)
            return {"writes refused": float(refused)} if free == 0 else {}

        return Injected([str(self._logs)], at_s, heal=heal)

    def _corrupt_slice(self, part: Part) -> Injected:
        """Cut the weight files short, behind a new name each: nobody who reads the old ones may crash. Then crash."""
        kept = {}
        for file in sorted(self._system.checkpoint.glob("*.safetensors")):
            kept[file] = file.resolve()
            damaged = file.with_suffix(".damaged")
            with kept[file].open("rb") as source:
                damaged.write_bytes(source.read(kept[file].stat().st_size // 2))
            damaged.replace(file)
        crashed = self._crash(Part("crash", part.target, AT_RANDOM, part.draw))

        def heal() -> dict[str, float]:
            for file, whole in kept.items():
                link = file.with_suffix(".whole")
                link.symlink_to(whole)
                link.replace(file)
            return {}

        crashed.heal = heal
        return crashed

    def _resize(self, part: Part) -> Injected:
        """Begin to change a number of parts, and kill any part at any moment of that. Healing waits for the end."""
        resizing = self._drover("resize", f"--{part.target}", part.point)
        time.sleep(part.draw * KILL_WITHIN_S)  # the moment is the fault's
        actors = self._system.actors()
        victim = sorted(actors)[int(part.draw * 7919) % len(actors)]
        at_s = time.monotonic()
        send(actors[victim], signal.SIGKILL)

        def heal() -> dict[str, float]:
            with resizing:
                try:
                    code = resizing.wait(RESIZED_WITHIN_S)
                except subprocess.TimeoutExpired:
                    resizing.kill()
                    raise BenchError(f"{part.target} {part.point} took longer than {RESIZED_WITHIN_S:g} s") from None
            if code:
                raise BenchError(f"drover resize --{part.target} {part.point} ended with {code}")
            return {"resized": 1.0}

        uncovered = int(victim.startswith("shard-") and self._system.shape.replicas == 1)
        return Injected([victim], at_s, f"{part.target} {part.point}", uncovered, gone=[actors[victim]], heal=heal)

    @property
    def _hosts(self) -> Hosts:
        assert self._system.hosts is not None
        return self._system.hosts

    @property
    def _network(self) -> Network:
        return self._hosts.network

    def _arm(self, actor: str, point: str, action: str) -> Path:
        file = self._system.folder / f"{actor}.{point}"
        partial = file.with_suffix(f".{point}.partial")
        partial.write_text(action)
        partial.rename(file)
        return file

    def _wait_for_hit(self, file: Path, timeout_s: float) -> float | None:
        """When the file was taken, by time.monotonic; None if it was not, and then it is removed."""
        hit, deadline_s = Path(f"{file}.hit"), time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if hit.exists():
                at_s = monotonic_of(hit.stat().st_ctime)
                hit.unlink()
                return at_s
            time.sleep(LOOK_S)  # the file is another process's
        file.unlink(missing_ok=True)
        return None


def _again(pid: int) -> Callable[[], None]:
    """What starts a process again as it was: its command line, environment, folder and network."""
    proc = Path(f"/proc/{pid}")
    command = [os.fsdecode(word) for word in (proc / "cmdline").read_bytes().split(b"\0")[:-1]]
    pairs = [os.fsdecode(pair).partition("=") for pair in (proc / "environ").read_bytes().split(b"\0") if b"=" in pair]
    environment = {name: value for name, _, value in pairs}
    folder = os.readlink(proc / "cwd")
    network = os.open(proc / "ns" / "net", os.O_RDONLY)

    def start() -> None:
        inside = ["nsenter", f"--net=/proc/self/fd/{network}", *command]
        subprocess.Popen(
            inside, env=environment, cwd=folder, pass_fds=[network], start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    return start

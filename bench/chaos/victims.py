"""From a target of the schedule to the processes that it means now."""

from collections.abc import Collection

from bench.chaos.schedule import SHARD_TARGETS, Part, minority
from bench.chaos.system import System
from bench.errors import BenchError

KINDS = {"frontend": "frontend", "haproxy": "haproxy", "gcs": "gcs_server", "raylet": "raylet"}
"""What /proc calls them."""


class Victims:
    """Chooses among the parts of one system."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._replicas_of = system.replicas_of()

    def of(self, part: Part) -> dict[str, int]:
        """Their process ids, by name. Raises BenchError if one is not there."""
        actors = self._system.actors()
        if part.target in SHARD_TARGETS:
            names = [f"shard-{number}" for number in self.shards(part)]
        elif part.target == "router":
            routers = sorted(name for name in actors if name.startswith("router-"))
            names = [routers[int(part.draw * len(routers))]] if routers else ["router"]
        elif part.target == "controller":
            names = ["controller"]
        elif part.target == "haproxy":  # with those before a reload, which still have connections
            pids = self._system.of_kind("haproxy")
            return {f"haproxy {pid}": pid for pid in pids}
        else:
            return {part.target: self._of_kind(part)}
        absent = [name for name in names if name not in actors]
        if absent:
            raise BenchError(f"{', '.join(absent)} does not run")
        return {name: actors[name] for name in names}

    def shards(self, part: Part) -> list[int]:
        """The numbers of the shards that a target means."""
        count = self._system.shape.shards
        if part.target == "minority":
            return minority(count, self._replicas_of, part.draw)
        if part.target == "replicas":
            return sorted(self._replicas_of[int(part.draw * len(self._replicas_of))])
        return [int(part.draw * count)]

    def uncovered(self, names: Collection[str]) -> int:
        """How many sets of replicas lie on these parts alone: while they are away, some experts are."""
        shards = {int(name.removeprefix("shard-")) for name in names if name.startswith("shard-")}
        return sum(holders <= shards for holders in self._replicas_of)

    def _of_kind(self, part: Part) -> int:
        pids = sorted(self._system.of_kind(KINDS[part.target]))
        if part.target == "raylet" and self._system.hosts is not None:
            pids = [pid for pid in pids if self._system.hosts.network.host_of(pid) != 0]
        if not pids:
            raise BenchError(f"no process of {part.target} was found")
        return pids[int(part.draw * len(pids))]

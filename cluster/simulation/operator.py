"""What changes a simulated deployment by itself: loads are sampled, the real policies decide, changes follow."""

import json
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, Protocol

from cluster.policy.autoscale import Decision, Scaler
from cluster.policy.balance import BalanceSettings, ShardRoom
from cluster.policy.decisions import DecisionLog, to_line
from cluster.policy.judgement import COPIES
from cluster.policy.load import LoadWindow
from cluster.policy.signals import signals_of
from cluster.policy.spread import spread
from cluster.simulation.changes import Changes
from cluster.simulation.router import SimulatedRouter
from cluster.simulation.scenario import Scenario
from router.counts.expert_totals import ExpertTotals


class World(Protocol):
    """What the operator needs of the simulation. shard_busy_s: shards' computing since the start, summed."""

    now_s: float
    changes: Changes
    shard_busy_s: float

    @property
    def routers(self) -> Sequence[SimulatedRouter]: ...

    def at(self, time_s: float, call: Callable[[], None]) -> None: ...

    def node_of(self, shard: int) -> str: ...

    def set_routers(self, number: int) -> None:
        """Have so many take requests; those that leave finish theirs."""
        ...


class Operator:
    """Samples every metrics_interval_s, and does what is decided. log: what was decided, and why."""

    def __init__(self, scenario: Scenario, world: World) -> None:
        self._scenario, self._world, self._settings = scenario, world, scenario.scale_settings
        self._scaler = Scaler(self._settings)
        self._window = LoadWindow(range(scenario.model.moe_layers), scenario.model.experts)
        self._balance = BalanceSettings(
            replicas=scenario.shards.replicas,
            expert_bytes=scenario.model.expert_bytes,
            bandwidth_bytes_s=scenario.costs.shard.load_mb_s * 1e6,
        )
        self._numbers = count(1)
        self._sampled: tuple[float, float] | None = None
        self._staying = set(range(scenario.num_shards))
        self._starting = 0
        self.log = DecisionLog()

    def decisions(self) -> list[dict[str, Any]]:
        """As plain data, the oldest first."""
        return [json.loads(to_line(decision)) for decision in self.log.rows()]

    def sample(self) -> None:
        """Take a sample, decide, act; and again after the interval."""
        world, state = self._world, self._world.changes.state
        self._window.add(world.now_s, {router.name: _totals(router) for router in world.routers})
        counts = {"shards": len(self._staying), "routers": len(world.routers), "frontends": 1}
        signals = signals_of(
            self._window, world.now_s, self._settings, self._balance, state.current, self._rooms(), counts,
            self._loads(), self._in_flight(),
        )  # fmt: skip
        decisions = self._scaler.decide(world.now_s, signals)
        self.log.add(decisions)
        for decision in decisions:
            if decision.acts:
                self._act(decision)
        world.at(world.now_s + self._settings.metrics_interval_s, self.sample)

    def look(self) -> None:
        """Have shards that stay hold about as much each, and let those go that hold nothing."""
        changes = self._world.changes
        if not changes.state.is_settled or self._starting:
            return
        used = changes.state.current.used_shards
        for number in sorted(set(changes.shards) - self._staying - used):
            changes.remove(number)
        if self._staying != used:
            nodes = {number: self._world.node_of(number) for number in sorted(self._staying)}
            target = spread(changes.state.current, nodes, self._scenario.shards.replicas, self._scenario.slots)
            changes.start(f"resize-{next(self._numbers)}", target, "resize")

    def _act(self, decision: Decision) -> None:
        world = self._world
        if decision.kind == COPIES and decision.proposal is not None:
            operation_id = f"{decision.decision}-{next(self._numbers)}"
            world.changes.start(operation_id, decision.proposal.placement, decision.decision)
        elif decision.kind == "shards" and decision.target > len(self._staying):
            self._starting = decision.target - len(self._staying)
            world.at(world.now_s + self._scenario.costs.shard.start_s, self._shards_started)
        elif decision.kind == "shards":
            self._staying = set(sorted(self._staying)[: decision.target])
        elif decision.kind == "routers":
            world.set_routers(decision.target)

    def _shards_started(self) -> None:
        """New shards get the lowest free numbers."""
        changes = self._world.changes
        free = (number for number in count() if number not in changes.shards)
        for _ in range(self._starting):
            number = next(free)
            changes.add(number)
            self._staying.add(number)
        self._starting = 0
        self.look()

    def _in_flight(self) -> str:
        if self._starting:
            return f"{self._starting} shards that start"
        if not self._world.changes.state.is_settled:
            return "a change of placement"
        return "" if self._staying == set(self._world.changes.shards) else "shards that leave"

    def _loads(self) -> dict[str, float | None]:
        """Of shards, the share of time in which they compute; of routers, their requests over max_running."""
        world = self._world
        then, self._sampled = self._sampled, (world.now_s, world.shard_busy_s)
        waiting = sum(router.load for router in world.routers)
        loads: dict[str, float | None] = {"routers": waiting / len(world.routers) / self._scenario.engine.max_running}
        if then is not None:
            loads["shards"] = (world.shard_busy_s - then[1]) / (world.now_s - then[0]) / max(1, len(self._staying))
        return loads

    def _rooms(self) -> Sequence[ShardRoom]:
        living = self._world.changes.living & self._staying
        return [
            ShardRoom(number, self._world.node_of(number), self._scenario.slots, is_usable=number in living)
            for number in sorted(self._world.changes.shards)
        ]


def _totals(router: SimulatedRouter) -> ExpertTotals:
    return ExpertTotals("", router.tokens_LE.copy(), router.reads_LE.copy())

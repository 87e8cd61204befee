"""What changes a simulated deployment by itself: loads are sampled, the real policies decide, changes follow.

Legend: L MoE layers, S shards.
"""

import json
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, Protocol

import numpy as np

from cluster.policy.autoscale import Decision, Scaler, Signals
from cluster.policy.balance import BalanceSettings, Proposal, ShardRoom, propose
from cluster.policy.decisions import DecisionLog, to_line
from cluster.policy.judgement import COPIES
from cluster.policy.load import LoadWindow
from cluster.simulation.changes import Changes
from cluster.simulation.recorder import imbalance
from cluster.simulation.router import SimulatedRouter
from cluster.simulation.scenario import Scenario
from experts.placement import Placement
from router.counts.expert_totals import ExpertTotals


class World(Protocol):
    """What the operator needs of the simulation."""

    now_s: float
    changes: Changes
    routers: list[SimulatedRouter]

    def at(self, time_s: float, call: Callable[[], None]) -> None: ...

    def node_of(self, shard: int) -> str: ...


class Operator:
    """Samples every metrics_interval_s, and does what is decided. log: what was decided, and why."""

    def __init__(self, scenario: Scenario, world: World) -> None:
        model, self._settings = scenario.model, scenario.autoscale.settings(scenario.num_shards, scenario.routers)
        self._scenario, self._world = scenario, world
        self._scaler = Scaler(self._settings)
        self._window = LoadWindow(range(model.moe_layers), model.experts)
        self._numbers = count(1)
        self.log = DecisionLog()

    def decisions(self) -> list[dict[str, Any]]:
        """As plain data, the oldest first."""
        return [json.loads(to_line(decision)) for decision in self.log.rows()]

    def sample(self) -> None:
        """Take a sample, decide, act; and again after the interval."""
        world = self._world
        totals = {
            router.name: ExpertTotals("", router.tokens_LE.copy(), router.reads_LE.copy()) for router in world.routers
        }
        self._window.add(world.now_s, totals)
        decisions = self._scaler.decide(world.now_s, self._signals())
        self.log.add(decisions)
        for decision in decisions:
            if decision.acts:
                self._act(decision)
        world.at(world.now_s + self._settings.metrics_interval_s, self.sample)

    def _act(self, decision: Decision) -> None:
        if decision.kind == COPIES and decision.proposal is not None:
            kind = f"{decision.decision}-{next(self._numbers)}"
            self._world.changes.start(kind, decision.proposal.placement, decision.decision)

    def _signals(self) -> Signals:
        scenario, world, settings = self._scenario, self._world, self._settings
        state = world.changes.state
        placement = state.current
        copies = sum(len(of) for by_expert in placement.shards_of.values() for of in by_expert)
        least = scenario.model.moe_layers * scenario.model.experts * scenario.shards.replicas
        counts = {"shards": len(world.changes.shards), "routers": len(world.routers), "frontends": 1}
        return Signals(
            counts=counts,
            loads=dict.fromkeys(counts),
            imbalance_stable=self._imbalance(settings.stable_window_s, placement),
            imbalance_panic=self._imbalance(settings.panic_window_s, placement),
            load_age_s=self._window.age_s(world.now_s),
            extra_copies=copies - least,
            in_flight="" if state.is_settled else "a change of placement",
            propose=self._propose,
        )

    def _imbalance(self, over_s: float, placement: Placement) -> float | None:
        """Of the present placement, under the load of the last seconds; None if there was none."""
        loads = self._window.loads(self._world.now_s, over_s)
        if loads is None:
            return None
        shards = sorted(self._world.changes.shards)
        mean_LE = loads.mean_LE
        load_LS = np.zeros((len(mean_LE), max(shards) + 1))
        for layer, by_expert in placement.shards_of.items():
            for expert, holders in enumerate(by_expert):
                load_LS[layer, list(holders)] += mean_LE[layer, expert] / len(holders)
        return imbalance(load_LS, shards)

    def _propose(self, over_s: float, horizon_s: float) -> Proposal:
        """A placement for the load of the last seconds."""
        scenario, changes = self._scenario, self._world.changes
        loads = self._window.loads(self._world.now_s, over_s)
        assert loads is not None, "the scaler asks only where load was measured"
        settings = BalanceSettings(
            replicas=scenario.shards.replicas,
            expert_bytes=scenario.model.expert_bytes,
            bandwidth_bytes_s=scenario.costs.shard.load_mb_s * 1e6,
            horizon_s=horizon_s,
        )
        return propose(loads, changes.state.current, self._rooms(), settings)

    def _rooms(self) -> Sequence[ShardRoom]:
        living = self._world.changes.living
        return [
            ShardRoom(number, self._world.node_of(number), self._scenario.slots, is_usable=number in living)
            for number in sorted(self._world.changes.shards)
        ]

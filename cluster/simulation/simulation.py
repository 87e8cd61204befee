"""The simulation: events in the order of their time, until the scenario's end."""

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from cluster.simulation.changes import CHANGE_S, LOOK_S, Changes
from cluster.simulation.operator import Operator
from cluster.simulation.recorder import Recorder
from cluster.simulation.route_table import RouteTable, ShardWork
from cluster.simulation.router import SimulatedRouter, Told
from cluster.simulation.routing import routing_of
from cluster.simulation.scenario import Scenario
from cluster.simulation.step_time import StepTimer
from cluster.simulation.traffic import Arrival, arrival, arrivals
from experts.placement import Placement, even_placement
from frontend.router_choice import choose_router


class Simulation:
    """One run of a scenario. The same scenario, seed included, gives the same rows, bit for bit.

    now_s: simulated seconds since the start.
    """

    def __init__(self, scenario: Scenario, requests: Sequence[Arrival] | None = None) -> None:
        """requests: those that come, in the order of their times, instead of the scenario's traffic.

        Raises DroverError where a recorded trace cannot be read.
        """
        self.scenario, self._requests = scenario, requests
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0
        model, shards, most = scenario.model, scenario.num_shards, scenario.most_shards
        placement = even_placement(
            range(model.moe_layers),
            model.experts,
            shards,
            replicas=scenario.shards.replicas,
            nodes=[self.node_of(shard) for shard in range(shards)],
        )
        self.routers: list[SimulatedRouter] = []
        self._leaving: list[SimulatedRouter] = []
        self.changes = Changes(scenario, placement, self, lambda: self._all_routers)
        self.operator = Operator(scenario, self) if scenario.num_shards else None
        self._routes: dict[int, RouteTable] = {}
        self.timer = StepTimer(scenario, most)
        self.slowdown_S = np.ones(most)
        self.shard_busy_s = 0.0
        self.recorder = Recorder(model.moe_layers, most)
        self._routing = routing_of(scenario.routing, model, scenario.seed)
        self._routers_made = 0
        for _ in range(scenario.routers):
            self._add_router()
        self._traffic_rng = np.random.default_rng([scenario.seed, 2])
        self.arrived = self.refused = 0
        self.last_token_s = 0.0

    @property
    def placement(self) -> Placement:
        """The current one."""
        return self.changes.state.current

    @property
    def is_only_router(self) -> bool:
        return len(self._all_routers) == 1

    @property
    def _all_routers(self) -> list[SimulatedRouter]:
        """Those that leave, too."""
        return [*self.routers, *self._leaving]

    def set_routers(self, number: int) -> None:
        """See World. New ones take requests once their process is there."""
        for _ in range(number - len(self.routers)):
            self.at(self.now_s + self.scenario.costs.shard.start_s, self._add_router)
        self._leaving += self.routers[number:]
        del self.routers[number:]

    def _add_router(self) -> None:
        self.routers.append(SimulatedRouter(self._routers_made, self.scenario, self._routing, self.placement, self))
        self._routers_made += 1

    def node_of(self, shard: int) -> str:
        return f"node-{shard // self.scenario.shards.per_node}"

    def at(self, time_s: float, call: Callable[[], None]) -> None:
        """Call back when it is that time; of the same time, in the order of asking."""
        self._order += 1
        heapq.heappush(self._events, (max(time_s, self.now_s), self._order, call))

    def run(self, on_progress: Callable[[float], None] = lambda now_s: None) -> dict[str, Any]:
        """Simulate to the end, and return the result as plain data; see docs/simulation.md."""
        scenario = self.scenario
        self._sample_at(scenario.sample_s, on_progress)
        self._look()
        if self.operator is not None:
            self.operator.sample()
        for fault in scenario.faults:
            self.at(fault.at_s, lambda shard=fault.shard: self._shard_dies(shard))  # type: ignore[misc]
        if self._requests is not None:
            self._expect(iter(self._requests))
        elif scenario.traffic.shape == "closed":
            for _ in range(scenario.traffic.streams):
                self._arrive(arrival(scenario.traffic, 0.0, self._traffic_rng))
        else:
            self._expect(arrivals(scenario.traffic, scenario.duration_s, self._traffic_rng))
        while self._events and self._events[0][0] <= scenario.duration_s:
            self.now_s, _, call = heapq.heappop(self._events)
            call()
        self.now_s = scenario.duration_s
        if not self.recorder.rows or self.recorder.rows[-1].time_s < round(self.now_s, 3):
            self._sample()
        return {
            "scenario": scenario.model_dump(mode="json"),
            "summary": self.recorder.summary(self.placement)
            | {
                "requests": self.arrived,
                "finished": self.recorder.finished,
                "refused": self.refused,
                "under_way": sum(router.load for router in self._all_routers),
                "moved_bytes": self.changes.moved_bytes,
                "shards": len(self.changes.living),
                "routers": len(self.routers),
            },
            "series": self.recorder.series(),
            "decisions": [] if self.operator is None else self.operator.decisions(),
        }

    def step_ended(self, tokens: list[Told], work: ShardWork) -> None:
        """See World."""
        self.recorder.step(tokens, work)
        if tokens:
            self.last_token_s = self.now_s
        if self.scenario.traffic.shape == "closed" and self._requests is None:
            ends_s = self.scenario.traffic.ends_s
            for token in tokens:
                if token.is_last and (ends_s is None or self.now_s < ends_s):
                    self._arrive(arrival(self.scenario.traffic, self.now_s, self._traffic_rng))

    def routes_of(self, placement: Placement) -> RouteTable:
        """See World."""
        if placement.epoch not in self._routes:
            self._routes[placement.epoch] = RouteTable(placement, self.changes.living, len(self.slowdown_S))
        return self._routes[placement.epoch]

    def shards_changed(self) -> None:
        """See cluster.simulation.changes.World."""
        self._routes.clear()
        loading = self.changes.loading
        slowdown = self.scenario.costs.shard.load_slowdown
        self.slowdown_S = np.array([slowdown if shard in loading else 1.0 for shard in range(len(self.slowdown_S))])
        for router in self._all_routers:
            router.resume()

    def _look(self) -> None:
        self.changes.look()
        self._leaving = [router for router in self._leaving if router.load]
        if self.operator is not None:
            self.operator.look()
        self.at(self.now_s + (LOOK_S if self.changes.state.is_settled else CHANGE_S), self._look)

    def _expect(self, coming: Iterator[Arrival]) -> None:
        """Wait for the next request of an open loop."""
        request = next(coming, None)
        if request is not None:

            def comes() -> None:
                self._arrive(request)
                self._expect(coming)

            self.at(request.at_s, comes)

    def _arrive(self, request: Arrival) -> None:
        self.arrived += 1
        prompt = (self.arrived, *([0] * (request.prompt_tokens - 1)))  # no two begin the same
        name = choose_router({router.name: router.load for router in self.routers}, prompt)
        chosen = next(router for router in self.routers if router.name == name)
        if not chosen.submit(f"request-{self.arrived}", prompt, request):
            self.refused += 1

    def _sample_at(self, time_s: float, on_progress: Callable[[float], None]) -> None:
        def sample() -> None:
            self._sample()
            on_progress(self.now_s)
            self._sample_at(time_s + self.scenario.sample_s, on_progress)

        self.at(time_s, sample)

    def _sample(self) -> None:
        self.recorder.sample(
            self.now_s,
            self.placement,
            shards=len(self.changes.living),
            routers=len(self.routers),
            running=sum(router.scheduler.num_running for router in self._all_routers),
            waiting=sum(router.scheduler.num_waiting for router in self._all_routers),
            moved_bytes=self.changes.moved_bytes,
        )

    def _shard_dies(self, shard: int) -> None:
        """Its rows are asked for elsewhere, and Ray starts it again."""
        if shard in self.changes.living:
            for router in self._all_routers:
                if not router.is_idle and not router.is_waiting:
                    router.lost_s = self.scenario.costs.link.lost_ms * 1e-3
        self.changes.dies(shard)

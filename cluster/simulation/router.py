"""A router that is only computed: the real scheduler, modelled steps.

Legend: T tokens, L MoE layers, E experts, S shards.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cluster.simulation.route_table import RouteTable, ShardWork
from cluster.simulation.routing import Counts, Routing
from cluster.simulation.scenario import Scenario
from cluster.simulation.step_time import Floats, StepTimer, StepTimes
from cluster.simulation.traffic import Arrival
from experts.placement import Placement
from router.errors import ResourceExhausted
from router.request import GenerationRequest, SamplingParams
from router.schedule.kv_layout import KvLayout
from router.schedule.limits import SchedulerLimits
from router.schedule.scheduler import Scheduler
from router.schedule.sequence import Work

BLOCK_TOKENS = 64
_NO_TOKENS: frozenset[int] = frozenset()


class World(Protocol):
    """What a router needs of the simulation."""

    now_s: float
    shard_busy_s: float
    slowdown_S: Floats
    timer: StepTimer

    @property
    def is_only_router(self) -> bool:
        """Whether nobody else ever asks the shards."""
        ...

    def routes_of(self, placement: Placement) -> RouteTable:
        """By the shards that live now."""
        ...

    def at(self, time_s: float, call: Callable[[], None]) -> None:
        """Call back when it is that time."""
        ...

    def step_ended(self, tokens: list["Told"], work: ShardWork) -> None:
        """A step has ended, which told these tokens and asked this of the shards."""
        ...


@dataclass(frozen=True)
class Told:
    """A token that a client has now. gap_s: since the one before, or since the request came if it is the first.

    output_tokens: that its request is to have.
    """

    gap_s: float
    is_first: bool
    is_last: bool
    output_tokens: int


@dataclass
class _Step:
    """Under way. epoch, work, times: None while it waits for an expert that is away."""

    began_s: float
    works: list[Work]
    tokens: int
    context: int
    rows_LE: Counts
    epoch: int | None = None
    work: ShardWork | None = None
    times: StepTimes | None = None
    factor: float = 1.0


class SimulatedRouter:
    """Steps in continuous batches, as long as there is anything to do.

    tokens_LE, reads_LE: rows that each expert got since the start, and steps in which it got any,
    as a router counts them.
    """

    def __init__(self, number: int, scenario: Scenario, routing: Routing, placement: Placement, world: World) -> None:
        engine, model = scenario.engine, scenario.model
        self.name = f"router-{number}"
        self._world, self._routing, self._jitter = world, routing, scenario.costs.jitter
        limits = SchedulerLimits(
            engine.max_running,
            engine.max_waiting,
            engine.max_step_tokens,
            kv_bytes=engine.kv_tokens // BLOCK_TOKENS,
            prefix_cache=False,
            prefill_slowdown=engine.prefill_slowdown,
        )
        chunk = BLOCK_TOKENS * -(-engine.kv_tokens // BLOCK_TOKENS)  # no attention chunk ends before a request does
        self.scheduler = Scheduler(limits, KvLayout(BLOCK_TOKENS, chunk, 1, 0, 1, 1, ()), lambda: world.now_s)
        self._rng = np.random.default_rng([scenario.seed, 1, number])
        self._last_s: dict[str, float] = {}
        self._first_position: dict[str, int] = {}
        self._step: _Step | None = None
        self._layer = 0
        self.tokens_LE: Counts = np.zeros((model.moe_layers, model.experts), np.int64)
        self.reads_LE = np.zeros_like(self.tokens_LE)
        self._placement = placement
        self.lost_s = 0.0
        """How much longer the step under way takes, because a shard has died."""

    @property
    def epoch(self) -> int:
        """Of the placement that all its steps use."""
        return self._placement.epoch if self._step is None or self._step.epoch is None else self._step.epoch

    def route(self, placement: Placement) -> None:
        """Go by this placement from the next step on."""
        self._placement = placement
        self.resume()

    @property
    def load(self) -> int:
        """Requests that run or wait."""
        return self.scheduler.num_running + self.scheduler.num_waiting

    @property
    def is_idle(self) -> bool:
        return self._step is None

    @property
    def is_waiting(self) -> bool:
        """For an expert that is away."""
        return self._step is not None and self._step.work is None

    def submit(self, request_id: str, prompt: tuple[int, ...], arrival: Arrival) -> bool:
        """Take a request; False if the queue is full."""
        sampling = SamplingParams(max_tokens=arrival.output_tokens, ignore_eos=True)
        try:
            self.scheduler.enqueue(GenerationRequest(request_id, prompt, sampling))
        except ResourceExhausted:
            return False
        self._last_s[request_id] = self._world.now_s
        position = self._routing.first_position(self._rng) if arrival.position is None else arrival.position
        self._first_position[request_id] = position
        if self.is_idle:
            self._begin()
        return True

    def resume(self) -> None:
        """The shards have changed: a step that waits for one may go on."""
        if self.is_waiting:
            self._start()

    def _begin(self) -> None:
        """Begin the next step, if there is anything to do."""
        works = self.scheduler.schedule()
        if not works:
            return
        ranges = [(self._first_position[work.sequence.request.request_id], work) for work in works]
        positions_T = np.concatenate(
            [np.arange(first + work.first, first + work.first + work.length) for first, work in ranges]
        )
        context = sum(work.length * work.first + work.length * (work.length + 1) // 2 for work in works)
        rows_LE = self._routing.counts(self._world.now_s, positions_T, self._rng)
        self._step = _Step(self._world.now_s, works, len(positions_T), context, rows_LE)
        self._start()

    def _start(self) -> None:
        """Send the step on its way, by the routes as they are now."""
        step, world = self._step, self._world
        assert step is not None
        routes = world.routes_of(self._placement)
        if routes.is_away(step.rows_LE):
            return  # `resume` comes back
        step.epoch = self._placement.epoch
        step.work = routes.share_out(step.rows_LE)
        step.times = world.timer.times(step.tokens, step.context, step.work, world.slowdown_S)
        world.shard_busy_s += float(step.times.work_LS.sum())
        if self._jitter:
            step.factor = float(np.exp(self._jitter * self._rng.standard_normal() - self._jitter**2 / 2))
        if world.is_only_router:
            self._after(world.timer.alone_s(step.times), self._end)
        else:
            self._layer = 0
            self._after(step.times.before_s, self._compute_layer)

    def _after(self, seconds: float, then: Callable[[], None]) -> None:
        assert self._step is not None
        self._world.at(self._world.now_s + seconds * self._step.factor, then)

    def _compute_layer(self) -> None:
        step = self._step
        assert step is not None
        assert step.times is not None
        if self._layer == len(step.times.router_L):
            self._end()
        else:
            self._after(float(step.times.router_L[self._layer]), self._ask_shards)

    def _ask_shards(self) -> None:
        step, world = self._step, self._world
        assert step is not None
        assert step.times is not None
        done_s = world.timer.layer_done_s(step.times, self._layer, world.now_s)
        self._layer += 1
        self._after(done_s - world.now_s, self._compute_layer)

    def _end(self) -> None:
        if self.lost_s:  # asked others for what a shard that died was asked for
            lost_s, self.lost_s = self.lost_s, 0.0
            self._world.at(self._world.now_s + lost_s, self._end)
            return
        step, world = self._step, self._world
        assert step is not None
        assert step.work is not None
        told = []
        for work in step.works:
            request_id = work.sequence.request.request_id
            is_first, samples = work.sequence.generated == 0, work.samples
            finish = self.scheduler.advance(work, 0 if samples else None, _NO_TOKENS)
            if samples:
                output_tokens = work.sequence.request.sampling.max_tokens
                told.append(Told(world.now_s - self._last_s[request_id], is_first, finish is not None, output_tokens))
                self._last_s[request_id] = world.now_s
            if finish is not None:
                del self._last_s[request_id], self._first_position[request_id]
        self.scheduler.record_step(step.works, world.now_s - step.began_s)
        self.tokens_LE += step.rows_LE
        self.reads_LE += step.rows_LE > 0
        world.step_ended(told, step.work)  # new requests may come of it, and wait for the next step
        self._step = None
        self._begin()

"""A router as a Ray actor: the model without its experts, the engine, and links to every shard.

Frontends talk to it in batches: `submit` and `cancel` carry many requests, and `pull` answers with
everything that was made for one frontend since its last pull. One call costs about 0.9 ms whatever
it carries; a call per token would cost more than the token.
"""

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import ray
import torch

from checkpoint.tensors import Checkpoint
from checkpoint.weights import WeightReader, router_bytes
from cluster.actors.link_keeper import LinkKeeper, LinkSettings
from cluster.actors.load_progress import LoadProgress
from cluster.actors.outboxes import Outboxes
from cluster.actors.start_orders import placement_to_route
from cluster.life_line import Heart
from cluster.part_names import part_number, shard_name
from cluster.policy.wanted import Orders
from cluster.reports import RATE_WINDOW_S, ActorState, Batch, HoldOrder, RouterLoad, RouterMetrics, RouterStats
from experts.link_table import LinkTable, Use
from experts.placement import Placement
from frontend.delta_stream import released
from frontend.router_client import Readiness
from frontend.router_connection import Pulse
from kernels.choose import choose_kernels
from kernels.cores import share_of_cores
from kernels.memory import free_bytes
from router.counts.requests import CANCELLED
from router.engine import Engine
from router.engine_thread import EngineThread
from router.errors import AlreadyExists, NotTaken, RequestError, Resumed, Unavailable
from router.kv_budget import KvBudget
from router.model.dispatch import Dispatcher
from router.model.llama4 import Model
from router.request import GenerationRequest, TokenDelta
from router.schedule.limits import SchedulerLimits

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RouterSpec:
    """What a router actor is to run.

    limits: all but kv_bytes, which follows from kv_budget once the weights are loaded. If the
    budget is a share of free memory, the shards must have loaded theirs, too.
    heal_s: how long a step waits for a shard that no other can stand in for.
    stuck_after_s: a layer that computes for longer ends the process.
    threads: None gives an equal share of its machine's cores. neighbours: how many routers share
    that machine, this one included.
    """

    name: str
    namespace: str
    checkpoint: Path
    placement: Placement
    dtype: torch.dtype
    device: str
    threads: int | None
    limits: SchedulerLimits
    kv_budget: KvBudget
    max_context_tokens: int | None
    frontend_grace_s: float
    links: LinkSettings
    heal_s: float
    stuck_after_s: float
    neighbours: int = 1


class RouterActor:
    """An asyncio actor; the engine has a thread of its own, and so has loading."""

    def __init__(self, spec: RouterSpec) -> None:
        self._threads = spec.threads or share_of_cores(spec.neighbours)
        torch.set_num_threads(self._threads)  # for the threads that begin later, too
        self._spec = spec
        self._progress = LoadProgress()
        self._links = LinkTable()
        self._dispatcher = Dispatcher(spec.placement, self._links, torch.device(spec.device), spec.heal_s)
        self._engine: EngineThread | None = None
        self._keeper: LinkKeeper | None = None
        self._linking = threading.Lock()
        self._outboxes = Outboxes()
        self._generated: deque[tuple[float, int]] = deque([(time.monotonic(), 0)], maxlen=RATE_WINDOW_S)
        self._missing_since_s: float | None = None
        self._down_since_s: dict[str, float] = {}
        self._orders, self._draining_since_s = Orders(), 0.0
        self._heart = Heart(spec.links.router_liveness.heartbeat_s, self._pulse)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watcher: asyncio.Task[None] | None = None
        threading.Thread(target=self._ask_and_load, name="load", daemon=True).start()

    async def state(self) -> ActorState:
        self._start_watching()
        return self._progress.state()

    async def readiness(self) -> Readiness:
        """Ready once the model is loaded and every shard has been linked; not while it refuses requests.

        After that requests are taken, and wait if they must: until some expert has been away for
        heal_s. Meanwhile `degraded` says what is missing.
        """
        if self._orders.is_stopping or self._orders.is_draining:
            return Readiness(False, f"{self._spec.name} is {'stopping' if self._orders.is_stopping else 'draining'}")
        if self._engine is None or self._keeper is None:
            return Readiness(False, f"{self._spec.name} is {self._progress.state().summary}")
        missing, missing_s = self._degraded(), self._missing_s()
        is_ready = not self._keeper.never_linked and (missing_s is None or missing_s < self._spec.heal_s)
        return Readiness(is_ready, "" if is_ready else missing, degraded=missing if is_ready else "")

    async def stats(self) -> RouterStats:
        engine = self._engine.stats if self._engine else None
        (first_s, first), (last_s, last) = self._generated[0], self._generated[-1]
        rate = (last - first) / (last_s - first_s) if last_s > first_s else 0.0
        asker = self._dispatcher.asker
        lines = self._heart.listeners
        slow = {shard_name(shard): round(ratio, 1) for shard, ratio in asker.slowness().items()}
        orders, down, now = self._orders, self._down(), time.monotonic()
        return RouterStats(
            engine,
            rate,
            len(self._outboxes),
            lines,
            down,
            dict(asker.retries),
            slow,
            open_requests=self._outboxes.open_requests,
            draining_s=now - self._draining_since_s if orders.is_draining else None,
            drained=tuple(map(shard_name, sorted(orders.shards))),
            is_stopping=orders.is_stopping,
            shard_names=orders.shard_names,
            down_s={name: now - self._down_since_s.get(name, now) for name in down},
            degraded=self._degraded(),
            epoch=self._dispatcher.epoch,
        )

    async def metrics(self) -> RouterMetrics:
        """What was counted, in full, for the metrics page."""
        engine = self._engine.snapshot if self._engine else None
        missing = self._dispatcher.missing_experts()
        is_degraded = bool(self._degraded())
        return RouterMetrics(engine, tuple(self._down()), dict(self._links.losses), missing, is_degraded)

    async def load(self) -> RouterLoad:
        """What was computed of each expert, and how full the router is: for autoscaling."""
        busy = self._engine.stats.fullness(self._spec.limits.max_running) if self._engine else 0.0
        return RouterLoad(self._dispatcher.load.totals(), busy, self._outboxes.open_requests)

    async def slots_of(self, shard: str) -> HoldOrder:
        """What the shard is to hold, as this router routes: for one that finds no controller."""
        return HoldOrder(0, self._dispatcher.placement.slots_of(part_number(shard)))

    async def placement(self) -> Placement:
        """What this router routes: for a part that finds no controller."""
        return self._dispatcher.placement

    async def placements_in_use(self) -> tuple[Placement, ...]:
        """The same, and what a step under way still uses: for a controller that finds nothing stored."""
        return self._dispatcher.in_use

    async def route(self, placement: Placement) -> None:
        """Route by this placement from the next step on; one that is older is ignored."""
        await asyncio.to_thread(self._dispatcher.route, placement)
        self._keep_links()

    async def follow(self, orders: Orders) -> None:
        """Follow these orders. Requests that the router has go on, whatever they are."""
        if not self._orders.is_draining:
            self._draining_since_s = time.monotonic()
        self._orders = orders
        self._links.drain(orders.shards)
        self._keep_links()

    async def submit(self, frontend_id: str, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests that `check_request` has passed; refusals come as deltas. Raises nothing.

        An id is in use until its last delta has reached the outbox, or the engine has forgotten
        it. Meanwhile a frontend that sends its request again goes on getting the first one's
        deltas. Others are refused the id.
        """
        self._start_watching()
        self._outboxes.hear(frontend_id)
        for request in requests:
            error = self._refusal(frontend_id, request)
            if error is not None:
                self._outboxes.tell(frontend_id, TokenDelta(request.request_id, error=error))
            elif self._engine is not None and request.request_id not in self._outboxes.owner_of:
                self._outboxes.owner_of[request.request_id] = frontend_id
                self._engine.submit(request)

    async def cancel(self, frontend_id: str, ending_of: Mapping[str, str]) -> None:
        """Forget this frontend's requests within one step; ids that it does not own are ignored.

        ending_of: how each is counted, by its id.
        """
        self._outboxes.drop(frontend_id, ending_of.keys())
        owner_of = self._outboxes.owner_of
        for request_id, ending in ending_of.items():
            if self._engine is not None and owner_of.get(request_id) == frontend_id:
                owner_of[request_id] = None
                self._engine.cancel(request_id, ending, self._forgotten)

    async def release(self, keep_of: Mapping[str, str]) -> None:
        """End what still runs of calls that are resumed, whichever frontend owns it: see `RouterClient.release`.

        keep_of: by call id.
        """
        for request_id in released(self._outboxes.owner_of, keep_of):
            owner = self._outboxes.owner_of[request_id]
            if owner is not None:
                await self.cancel(owner, {request_id: CANCELLED})
                self._outboxes.tell(owner, TokenDelta(request_id, error=Resumed()))

    async def expect_frontend(self, secret: bytes) -> tuple[str, int]:
        """Beat for the frontend that knows the secret. Returns where it has to connect."""
        return self._heart.expect(ray.util.get_node_ip_address(), secret)

    async def pull(self, frontend_id: str, receipt: int) -> Batch:
        """Everything made for this frontend since the batch that `receipt` names: see `Outboxes.pull`."""
        self._start_watching()
        return await self._outboxes.pull(frontend_id, receipt)

    def _refusal(self, frontend_id: str, request: GenerationRequest) -> RequestError | None:
        request_id = request.request_id
        if self._engine is None:
            return NotTaken(f"{self._spec.name} is {self._progress.state().summary}")
        owner = self._outboxes.owner_of.get(request_id, frontend_id)
        if owner is None:
            return AlreadyExists(f"request {request_id} was cancelled and has not ended yet")
        if owner != frontend_id:
            return AlreadyExists(f"request {request_id} of another frontend is under way already")
        if request_id in self._outboxes.owner_of:
            return None
        if self._orders.is_stopping and not (request.made or request.replayed):  # else it had begun before
            return Unavailable("the server is stopping")
        if self._orders.is_draining:
            return NotTaken(f"{self._spec.name} is draining")
        return None

    def _keep_links(self) -> None:
        """Link the shards that the orders name, and those that the router needs: it may have no orders yet."""
        with self._linking:  # who comes last has seen the newest orders
            if self._keeper is not None:
                self._keeper.want({*self._orders.shard_names, *map(shard_name, self._dispatcher.needed_shards)})

    def _pulse(self) -> Pulse:
        """In threads of the heart."""
        engine = self._engine
        if engine is None:
            return Pulse(serving=False, draining=False, load=0)
        stats = engine.stats
        load = stats.running + stats.waiting
        return Pulse(serving=True, draining=self._orders.is_draining, load=load, missing_s=self._missing_s() or 0.0)

    def _down(self) -> dict[str, str]:
        reasons = self._dispatcher.down_reasons().items()
        return {shard_name(shard): reason for shard, reason in reasons if shard not in self._orders.shards}

    def _missing_s(self) -> float | None:
        """How long some expert has had no living shard; None: each has one. As `_look_around` last saw it."""
        return None if self._missing_since_s is None else time.monotonic() - self._missing_since_s

    def _degraded(self) -> str:
        """Who is missing or still reads its experts, why, and how many experts nobody has; empty if all is well."""
        reasons = self._down()
        for shard, use in self._links.use_of.items():
            if use is Use.LOADING and shard not in self._orders.shards:
                reasons[shard_name(shard)] = "has not read all of its experts yet"
        told = [f"{name}: {reason}" for name, reason in reasons.items()]
        if count := self._dispatcher.missing_experts():
            told.append(f"no living shard has {count} of the experts")
        return "; ".join(told)

    def _unlinked(self) -> str:
        return "; ".join(f"{name}: {reason}" for name, reason in self._down().items())

    def _start_watching(self) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._watcher = self._loop.create_task(self._watch())

    async def _watch(self) -> None:
        """Every second, whatever went wrong the last time: see `_look_around`."""
        while True:
            try:
                await self._look_around()
            except Exception:
                logger.exception("watching failed")
            await asyncio.sleep(1.0)

    async def _look_around(self) -> None:
        """Note the speed, and who and what is missing; cancel the requests of frontends that have gone."""
        now = time.monotonic()
        if not self._dispatcher.missing_experts():
            self._missing_since_s = None
        elif self._missing_since_s is None:
            self._missing_since_s = now
        self._down_since_s = {name: self._down_since_s.get(name, now) for name in self._down()}
        self._generated.append((now, self._engine.stats.generated_tokens if self._engine else 0))
        for frontend_id, open_requests in self._outboxes.silent_since(now - self._spec.frontend_grace_s).items():
            if open_requests:
                logger.warning("%s has gone; its %d requests are cancelled", frontend_id, len(open_requests))
                await self.cancel(frontend_id, dict.fromkeys(open_requests, CANCELLED))
            self._outboxes.remove(frontend_id)

    def _deliver(self, deltas: Sequence[TokenDelta]) -> None:
        # In the engine's thread. A request reaches the engine through `submit`, which has set the
        # loop.
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._outboxes.put, deltas)

    def _forgotten(self, request_id: str) -> None:
        # In the engine's thread. It comes to the loop after every delta of the request.
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._outboxes.owner_of.pop, request_id, None)

    def _ask_and_load(self) -> None:
        if (placement := placement_to_route(self._spec.name, self._spec.namespace)) is not None:
            self._dispatcher.route(placement)
        self._progress.run(self._load)

    def _load(self) -> None:
        spec = self._spec
        checkpoint, device = Checkpoint.open(spec.checkpoint), torch.device(spec.device)
        self._progress.expect(router_bytes(checkpoint))
        weights = WeightReader(checkpoint, spec.dtype, device, self._progress.add_bytes)
        model = Model(checkpoint.config, weights, self._dispatcher, choose_kernels(device, spec.dtype, self._threads))
        if self._keeper is None:  # else an earlier try has got so far
            self._keeper = LinkKeeper(
                self._links,
                lambda: self._dispatcher.needed_shards,
                lambda name: ray.get_actor(name, namespace=spec.namespace),
                spec.links,
                spec.name,
                device,
            )
            self._keep_links()
        if spec.kv_budget.share is not None:  # a shard on this machine that still loads has not taken its memory yet
            self._progress.wait(self._keeper.wait_until_all_were_loaded, self._unlinked)
        step_bytes = model.step_bytes(
            spec.limits.max_step_tokens, spec.max_context_tokens or checkpoint.config.max_position_embeddings
        )
        kv_bytes = spec.kv_budget.resolve(model.kv_layout, free_bytes(device), router_bytes(checkpoint), step_bytes)
        # A router without its engine is worth nothing; when its process ends, Ray starts a new one.
        self._engine = EngineThread(
            Engine(model, replace(spec.limits, kv_bytes=kv_bytes), spec.max_context_tokens),
            self._deliver,
            on_crash=lambda: os._exit(1),
            stuck_after_s=spec.stuck_after_s,
        )

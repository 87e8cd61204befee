"""A router as a Ray actor: the model without its experts, the engine, and links to every shard.

Frontends talk to it in batches: `submit` and `cancel` carry many requests, and `pull` answers with everything that was
made for one frontend since its last pull. One call costs about 0.9 ms whatever it carries; a call per token would
cost more than the token.
"""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
import torch

from checkpoint.tensors import Checkpoint
from cluster.actor_state import ActorState, LoadProgress
from cluster.link_keeper import LinkKeeper, LinkSettings, NoLink
from experts.placement import Placement
from frontend.router_client import Readiness
from router.dispatch import Dispatcher
from router.engine import Engine, EngineStats
from router.engine_thread import EngineThread
from router.errors import Unavailable
from router.model import Model
from router.request import GenerationRequest, TokenDelta
from router.scheduler import SchedulerLimits
from router.weights import WeightReader, router_bytes

logger = logging.getLogger(__name__)

LONG_POLL_S = 1.0
# A frontend that has not pulled for so long is taken for dead, and its requests are cancelled.
FRONTEND_GRACE_S = 30.0


@dataclass(frozen=True)
class RouterSpec:
    """What a router actor is to run. shard_names: actor names, by shard number."""

    name: str
    namespace: str
    checkpoint: Path
    placement: Placement
    shard_names: tuple[str, ...]
    dtype: torch.dtype
    device: str
    threads: int
    limits: SchedulerLimits
    max_context_tokens: int | None
    links: LinkSettings


@dataclass(frozen=True)
class RouterStats:
    """tokens_per_s: generated, averaged since the last call of stats. down: shard name -> why."""

    engine: EngineStats | None
    tokens_per_s: float
    frontends: int
    down: dict[str, str]


@dataclass
class _Outbox:
    """Deltas for one frontend that it has not pulled yet."""

    deltas: list[TokenDelta]
    filled: asyncio.Event
    pulled_s: float


class RouterActor:
    """An asyncio actor; the engine has a thread of its own, and so has loading."""

    def __init__(self, spec: RouterSpec) -> None:
        torch.set_num_threads(spec.threads)
        self._spec = spec
        self._progress = LoadProgress()
        self._dispatcher = Dispatcher(spec.placement, [NoLink("not linked yet")] * len(spec.shard_names))
        self._engine: EngineThread | None = None
        self._outboxes: dict[str, _Outbox] = {}
        self._frontend_of: dict[str, str] = {}
        self._measured = (time.monotonic(), 0)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reaper: asyncio.Task[None] | None = None
        threading.Thread(target=self._progress.run, args=(self._load,), name="load", daemon=True).start()

    async def state(self) -> ActorState:
        return self._progress.state()

    async def readiness(self) -> Readiness:
        """Ready once the model is loaded and every shard is linked."""
        if self._engine is None:
            return Readiness(False, f"{self._spec.name} is {self._progress.state().summary}")
        down = self._down()
        return Readiness(not down, "; ".join(f"{name}: {reason}" for name, reason in down.items()))

    async def stats(self) -> RouterStats:
        engine = self._engine.stats if self._engine else None
        now, generated = time.monotonic(), engine.generated_tokens if engine else 0
        before_s, before = self._measured
        self._measured = (now, generated)
        rate = (generated - before) / max(now - before_s, 1e-9)
        return RouterStats(engine, rate, len(self._outboxes), self._down())

    async def submit(self, frontend_id: str, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests that `check_request` has passed; refusals come as deltas. Raises nothing."""
        self._attend_to_the_loop()
        outbox = self._outbox(frontend_id)
        for request in requests:
            if self._engine is None:
                error = Unavailable(f"{self._spec.name} is {self._progress.state().summary}")
                outbox.deltas.append(TokenDelta(request.request_id, error=error))
                outbox.filled.set()
                continue
            self._frontend_of[request.request_id] = frontend_id
            self._engine.submit(request)

    async def cancel(self, request_ids: Sequence[str]) -> None:
        """Forget requests within one step; unknown ones are ignored."""
        for request_id in request_ids:
            if self._frontend_of.pop(request_id, None) is not None and self._engine is not None:
                self._engine.cancel(request_id)

    async def pull(self, frontend_id: str) -> list[TokenDelta]:
        """Everything made for this frontend since its last pull; waits up to LONG_POLL_S for something."""
        self._attend_to_the_loop()
        outbox = self._outbox(frontend_id)
        outbox.pulled_s = time.monotonic()
        try:
            await asyncio.wait_for(outbox.filled.wait(), LONG_POLL_S)
        except asyncio.TimeoutError:
            return []
        outbox.filled.clear()
        deltas, outbox.deltas = outbox.deltas, []
        outbox.pulled_s = time.monotonic()
        return deltas

    def _outbox(self, frontend_id: str) -> _Outbox:
        return self._outboxes.setdefault(frontend_id, _Outbox([], asyncio.Event(), time.monotonic()))

    def _down(self) -> dict[str, str]:
        return {self._spec.shard_names[shard]: reason for shard, reason in self._dispatcher.down_reasons().items()}

    def _attend_to_the_loop(self) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._reaper = self._loop.create_task(self._reap_dead_frontends())

    async def _reap_dead_frontends(self) -> None:
        while True:
            await asyncio.sleep(FRONTEND_GRACE_S / 3)
            oldest = time.monotonic() - FRONTEND_GRACE_S
            for frontend_id in [f for f, outbox in self._outboxes.items() if outbox.pulled_s < oldest]:
                logger.warning("frontend %s has gone; its requests are cancelled", frontend_id)
                del self._outboxes[frontend_id]
                await self.cancel([request for request, owner in self._frontend_of.items() if owner == frontend_id])

    def _deliver(self, deltas: Sequence[TokenDelta]) -> None:
        # In the engine's thread. A request reaches the engine through `submit`, which has set the loop.
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._sort, deltas)

    def _sort(self, deltas: Sequence[TokenDelta]) -> None:
        for delta in deltas:
            frontend_id = self._frontend_of.get(delta.request_id)
            if frontend_id is None:
                continue  # cancelled meanwhile
            if delta.is_last:
                del self._frontend_of[delta.request_id]
            outbox = self._outboxes.get(frontend_id)
            if outbox is not None:
                outbox.deltas.append(delta)
                outbox.filled.set()

    def _load(self) -> None:
        spec = self._spec
        checkpoint, device = Checkpoint.open(spec.checkpoint), torch.device(spec.device)
        self._progress.expect(router_bytes(checkpoint))
        weights = WeightReader(checkpoint, spec.dtype, device, self._progress.add_bytes)
        model = Model(checkpoint.config, weights, self._dispatcher)
        self._keeper = LinkKeeper(
            self._dispatcher,
            list(spec.shard_names),
            lambda name: ray.get_actor(name, namespace=spec.namespace),
            spec.links,
            spec.name,
            device,
        )
        # A router without its engine is worth nothing; when its process ends, Ray starts a new one.
        self._engine = EngineThread(
            Engine(model, spec.limits, spec.max_context_tokens), self._deliver, on_crash=lambda: os._exit(1)
        )

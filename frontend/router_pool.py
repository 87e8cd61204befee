"""Several routers that look like one: chooses one for each request, and another when it goes.

A request that has lost its router is sent again, with the tokens that its client has: to another
router, or to the same one once it is back. Noise is keyed by position, so the answer goes on as
if nothing had happened. It stands still for as long as the prompt and these tokens take to
compute, or until a router is there, at most heal_s.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import replace

from frontend.delta_stream import DeltaStream, DeltaStreams
from frontend.known_router import KnownRouter
from frontend.router_choice import choose_router
from frontend.router_client import Readiness
from frontend.router_connection import Pulse, RouterConnection
from frontend.running_request import RunningRequest
from router.counts.requests import MOVED
from router.errors import (
    AlreadyExists,
    DeadlineExceeded,
    ExpertsAway,
    Internal,
    NotTaken,
    RequestError,
    ResourceExhausted,
    Resumed,
    RouterUnavailable,
    Unavailable,
)
from router.request import LOST, UNAVAILABLE, GenerationRequest, RequestLimits, TokenDelta

logger = logging.getLogger(__name__)

# Between two attempts to place a request that no router takes.
RETRY_S = 0.25
# A request that so many routers in a row died of is not sent to another one.
MAX_LOSSES = 3
# A router that misses experts for so long loses its requests to one that has missed none for
# WELL_S. A shard's death does not start this: routers notice it, and its return, almost together.
MISSING_S, WELL_S = 1.0, 1.0
NO_ROUTER = "there is no router"


class RouterPool:
    """A RouterClient over any number of routers. Lives on one event loop.

    `submit` and `cancel` are for the streams that `generate` makes; `beat`, `down` and `deliver`
    for the connections.
    """

    def __init__(self, connections: Sequence[RouterConnection], limits: RequestLimits, heal_s: float) -> None:
        """Must be called on the event loop that will use it. heal_s: how long a request waits for a router when
        none is there."""
        self._routers = {connection.name: KnownRouter(connection) for connection in connections}
        self._limits, self._heal_s = limits, heal_s
        self._streams = DeltaStreams(self)
        self._running: dict[str, RunningRequest] = {}
        self._stranded: dict[str, RunningRequest] = {}  # those whose router is down, or that have none
        self._minder: asyncio.Task[None] | None = None
        self._last_placed: tuple[Sequence[int], str] = ((), "")
        for connection in connections:
            connection.start(self)

    def follow(self, names: Collection[str], connect: Callable[[str], RouterConnection]) -> None:
        """Know the routers of these names from now on. Others are forgotten once they are down.

        connect: makes the way to a new one.
        """
        for name in [name for name in names if name not in self._routers]:
            logger.info("%s is new", name)
            self._routers[name] = KnownRouter(connect(name))
            self._routers[name].connection.start(self)
        for name in [name for name, router in self._routers.items() if name not in names and not router.up]:
            logger.info("%s is gone", name)
            for running in self._running.values():
                if running.router == name:
                    running.router = None
            self._routers.pop(name).connection.close()

    async def limits(self) -> RequestLimits:
        return self._limits

    async def readiness(self) -> Readiness:
        """Ready as soon as one router says that it is; `degraded` names those that are down. If none does, what each
        is missing."""
        details = []
        connections = [router.connection for router in self._routers.values()]
        async with aclosing(_as_they_come(connections)) as answers:
            async for readiness in answers:
                if readiness.ready:
                    missing = [router.detail for router in self._routers.values() if not router.up]
                    return replace(readiness, degraded="; ".join(filter(None, [*missing, readiness.degraded])))
                details.append(readiness.detail)
        return Readiness(False, "; ".join(sorted(details)) or NO_ROUTER)

    def generate(self, requests: Sequence[GenerationRequest]) -> DeltaStream:
        return self._streams.new_stream(requests)

    def release(self, call_id: str, keep: str) -> None:
        """See RouterClient. Whichever router has the call, each hears of it, if need be once it answers again."""
        self._streams.release(call_id, keep)
        for router in self._routers.values():
            router.connection.release(call_id, keep)

    def submit(self, request: GenerationRequest) -> None:
        """Send a request to a router, or let it wait for one."""
        running = RunningRequest.of(request, self._now_s())
        self._running[request.request_id] = running
        self._strand(running)
        self._place([running])

    def cancel(self, request_id: str, ending: str) -> None:
        """Forget a request. Its router hears of it, if need be once it answers again."""
        running = self._running.get(request_id)
        if running is not None:
            self._forget(running)
            self._leave_router(running, ending)

    def beat(self, router: str, pulse: Pulse) -> None:
        """A router answers. If it was down, it gets what it had: it may have been restarted."""
        if not pulse.serving:
            self.down(router, UNAVAILABLE, f"{router} is loading its model")
            return
        state = self._routers[router]
        state.hear(pulse, self._now_s())
        if not state.up:
            state.up = True
            logger.info("%s answers", router)
            self._place(list(self._stranded.values()))
        if pulse.missing_s >= MISSING_S and self._is_another_well(router):
            self._move_away_from(router)

    def down(self, router: str, cause: str, detail: str) -> None:
        """A router cannot be reached. Its requests go to others, or wait."""
        state = self._routers[router]
        state.detail = detail
        if not state.up:
            return
        state.fall()
        if state.draining and cause == LOST:
            cause = UNAVAILABLE  # whoever drains a router ends it at last; it did not die of a request
        stranded = [running for running in self._running.values() if running.router == router]
        logger.warning("%s; %d requests are sent again", detail, len(stranded))
        for running in stranded:
            running.replayed = cause
            running.losses += cause == LOST
            running.give_up_s = None
            self._strand(running)
        self._place(stranded)

    def _is_another_well(self, router: str) -> bool:
        latest_s = self._now_s() - WELL_S
        others = [state for name, state in self._routers.items() if name != router]
        return any(state.well_since_s <= latest_s and not state.draining for state in others)

    def _move_away_from(self, router: str) -> None:
        """Send a router's requests to others: it waits for experts that these can reach."""
        moving = [running for running in self._running.values() if running.router == router]
        if moving:
            logger.warning("%s misses experts; %d requests are sent again", router, len(moving))
        for running in moving:
            running.replayed = UNAVAILABLE
            self._leave_router(running, MOVED)
            self._strand(running)
        self._place(moving)

    def deliver(self, router: str, deltas: Sequence[TokenDelta]) -> None:
        """Hand on what is new in these. What an earlier router of a request still makes is not for anybody."""
        told, again = [], []
        for delta in deltas:
            running = self._running.get(delta.request_id)
            if running is None or running.router != router:
                continue
            if self._goes_elsewhere(running, delta):
                again.append(running)
                continue
            new = running.news(delta)
            if new is None:
                continue
            told.append(new)
            if new.is_last:
                self._routers[router].own -= 1
                self._forget(running)
        self._streams.deliver(told)
        self._place(again)

    def _goes_elsewhere(self, running: RunningRequest, delta: TokenDelta) -> bool:
        """Whether the delta ends the request at its router but not for its client: another may take it.

        If so, the request is stranded.
        """
        assert running.router is not None
        router, error = running.router, delta.error
        if delta.first > len(running.made):
            logger.error("%s told token %d of %s after %d", router, delta.first, delta.request_id, len(running.made))
            running.replayed = UNAVAILABLE
            self._leave_router(running, MOVED)
        elif isinstance(error, RouterUnavailable):
            # One that was never queued anywhere goes into the queue like any new one.
            running.replayed = running.replayed if isinstance(error, NotTaken) else UNAVAILABLE
        elif isinstance(error, ExpertsAway):
            if not self._candidates(running.refused_by | {router}):
                return False
            running.replayed = UNAVAILABLE
        elif isinstance(error, ResourceExhausted) and error.retry_after_s is not None:
            # A client whose request was accepted once must not hear that there is no room for it.
            if not running.replayed and not self._candidates(running.refused_by | {router}):
                return False
        elif not isinstance(error, AlreadyExists) or isinstance(error, Resumed) or not running.replayed:
            # Where a request has run before, its id may be in use until the router has read the cancellation.
            return False
        if running.router is not None:
            self._routers[router].own -= 1
            running.router = None
        running.refused_by.add(router)
        self._strand(running)
        return True

    def _strand(self, running: RunningRequest) -> None:
        """Note that the request waits for a router, and until when."""
        if running.give_up_s is None:
            running.give_up_s = self._now_s() + self._heal_s
        self._stranded[running.request.request_id] = running

    def _place(self, stranded: Sequence[RunningRequest]) -> None:
        """Send each of these to a router, if one takes it; end those that nobody can help any more."""
        now_s, ends = self._now_s(), []
        for running in stranded:
            if running.request.request_id not in self._stranded:
                continue  # cancelled meanwhile
            name = self._router_for(running)
            end = self._end_of(running, name, now_s)
            if end is not None:
                ends.append(end)
                self._forget(running)
                self._leave_router(running, MOVED)
            elif name is not None:
                if name != running.router:
                    self._leave_router(running, MOVED)
                    running.router = name
                    self._routers[name].own += 1
                del self._stranded[running.request.request_id]
                self._last_placed = running.request.prompt_token_ids, name
                self._routers[name].connection.submit(running.rest(now_s))
        self._streams.deliver(ends)
        if self._stranded and (self._minder is None or self._minder.done()):
            self._minder = asyncio.create_task(self._mind_stranded())

    def _router_for(self, running: RunningRequest) -> str | None:
        """The router that takes the request now; None if there is none."""
        if running.router is not None and self._routers[running.router].up:
            return running.router  # it is back, and may still have the request
        candidates = self._candidates(running.refused_by)
        if not candidates:
            return None
        prompt, name = self._last_placed
        if prompt is running.request.prompt_token_ids and name in candidates:
            return name  # answers to one prompt share its cache
        return choose_router(candidates, running.request.prompt_token_ids)

    def _candidates(self, refused_by: set[str]) -> dict[str, int]:
        """The routers that take new requests, with their loads: those that miss no expert, if there are any."""
        takers = {
            name: router
            for name, router in self._routers.items()
            if router.up and not router.draining and name not in refused_by
        }
        well = {name: router for name, router in takers.items() if not router.missing_s}
        return {name: router.load for name, router in (well or takers).items()}

    def _end_of(self, running: RunningRequest, router: str | None, now_s: float) -> TokenDelta | None:
        """The last delta of a stranded request, if it ends now. router: where it can go."""
        request_id = running.request.request_id
        error: RequestError | None = None
        finish = running.finish(self._limits.eos_token_ids)
        if finish is not None:
            return TokenDelta(request_id, finish_reason=finish, first=len(running.made))
        if running.is_late(now_s):
            error = DeadlineExceeded("the request's deadline passed before it was done")
        elif running.losses >= MAX_LOSSES:
            error = Internal(f"{running.losses} routers in a row ended that had this request; it is not sent again")
        elif router is None and self._gives_up(running, now_s):
            error = Unavailable(self._why_nobody_serves())
        return None if error is None else TokenDelta(request_id, error=error)

    def _gives_up(self, running: RunningRequest, now_s: float) -> bool:
        assert running.give_up_s is not None
        return now_s >= running.give_up_s and all(router.is_known for router in self._routers.values())

    def _why_nobody_serves(self) -> str:
        reasons = [
            router.detail if not router.up else f"{name} is draining" if router.draining else f"{name} has no room"
            for name, router in self._routers.items()
        ]
        return f"{'; '.join(reasons) or NO_ROUTER}; try again"

    async def _mind_stranded(self) -> None:
        """Try again, for as long as there are stranded requests: nobody tells when a router has room."""
        while self._stranded:
            await asyncio.sleep(RETRY_S)
            for running in self._stranded.values():
                running.refused_by.clear()
            self._place(list(self._stranded.values()))

    def _leave_router(self, running: RunningRequest, ending: str) -> None:
        """Take the request back from the router that has it, or had it before going down."""
        if running.router is not None:
            self._routers[running.router].own -= 1
            self._routers[running.router].connection.cancel(running.request.request_id, ending)
            running.router = None

    def _forget(self, running: RunningRequest) -> None:
        del self._running[running.request.request_id]
        self._stranded.pop(running.request.request_id, None)

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()


async def _as_they_come(connections: Sequence[RouterConnection]) -> AsyncGenerator[Readiness, None]:
    """The readiness of each router, the first answer first. A hung router keeps nobody waiting."""
    asked = [asyncio.ensure_future(connection.readiness()) for connection in connections]
    try:
        for answer in asyncio.as_completed(asked):
            yield await answer
    finally:
        for answer in asked:
            answer.cancel()

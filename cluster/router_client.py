"""A frontend's way to one router actor: the one place where tokens, in batches, cross Ray."""

import asyncio
import logging
import secrets
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

import ray

from cluster.life_line import LifeLine
from frontend.router_client import Readiness
from frontend.router_connection import Pulse, RouterListener
from router.errors import Unavailable
from router.request import LOST, SILENT, GenerationRequest

logger = logging.getLogger(__name__)

# Between two attempts to reach a router that is down. Ray tells nobody when it has restarted an actor.
RETRY_S = 0.2
# Of a call that a router answers at once. A frozen one never does.
CALL_TIMEOUT_S = 5.0
# Ray itself has no deadline for telling where an actor is.
FIND_TIMEOUT_S = 5.0
_Answer = TypeVar("_Answer")

MAX_RELEASES = 1024  # kept for a router that is down


class RayRouterConnection:
    """A RouterConnection over Ray.

    It keeps a life line to the router, and forms a new one whenever it has ended. While the router
    has requests of this frontend, one pull is always under way.
    """

    def __init__(self, name: str, namespace: str, frontend_id: str, silence_s: float) -> None:
        """silence_s: a router whose life line is silent for so long is down."""
        self.name = name
        self._namespace, self._frontend_id, self._silence_s = namespace, frontend_id, silence_s
        self._receipt = -1  # no batch has this number
        self._open: set[str] = set()  # ids of requests that the router has, or will have with the next mail
        self._to_submit: dict[str, GenerationRequest] = {}
        self._to_cancel: dict[str, str] = {}  # request id -> how its end is counted
        self._to_release: dict[str, str] = {}  # call id -> what to keep
        self._puller: asyncio.Task[None] | None = None
        self._mailer: asyncio.Task[None] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._broken: asyncio.Future[tuple[str, str]] | None = None
        """While the router is reached, or about to be: why it no longer is."""
        self._down_detail = f"{name} is not reached yet"
        self._last_error = ""
        self._router: ray.actor.ActorHandle | None = None
        self._finding: asyncio.Future[ray.actor.ActorHandle] | None = None
        # Threads of its own: a look-up may block for as long as Ray's head is away. One is made at a time, and the
        # other thread forms life lines.
        self._threads = ThreadPoolExecutor(2, f"reach {name}")

    def start(self, listener: RouterListener) -> None:
        self._listener = listener
        self._keeper = asyncio.create_task(self._keep())

    def close(self) -> None:
        self._broken = None
        for task in (self._keeper, self._mailer, self._puller):
            if task is not None:
                task.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def readiness(self) -> Readiness:
        broken = self._broken
        if broken is None or self._router is None:
            return Readiness(False, self._down_detail)
        try:
            return await self._answer(self._router.readiness.remote(), broken)
        except Exception as error:
            return Readiness(False, self._detail_of(error))

    def submit(self, request: GenerationRequest) -> None:
        """Send a request with the next mail, and pull until it has ended."""
        self._to_submit[request.request_id] = request
        self._open.add(request.request_id)
        self._mail()
        if self._puller is None or self._puller.done():
            self._puller = asyncio.create_task(self._pull_while_open())

    def cancel(self, request_id: str, ending: str) -> None:
        """Send a cancellation with the next mail, or withdraw a request that was not sent yet."""
        self._open.discard(request_id)
        if self._to_submit.pop(request_id, None) is None:
            self._to_cancel[request_id] = ending
            self._mail()

    def release(self, call_id: str, keep: str) -> None:
        self._to_release[call_id] = keep
        if len(self._to_release) > MAX_RELEASES:  # the oldest; what it should end goes on for frontend.grace_s
            del self._to_release[next(iter(self._to_release))]
        self._mail()

    async def _keep(self) -> None:
        """Reach the router again and again, for as long as the process lives."""
        while True:
            try:
                cause, self._down_detail = await self._live()
            except Exception as error:
                cause, self._down_detail = LOST, self._detail_of(error)
            self._broken = None
            for task in (self._mailer, self._puller):
                if task is not None:
                    task.cancel()
            self._mailer = self._puller = None
            self._to_submit.clear()
            self._open.clear()
            self._listener.down(self.name, cause, self._down_detail)
            await asyncio.sleep(RETRY_S)

    async def _live(self) -> tuple[str, str]:
        """Form a life line. Once it has ended, return the cause and what to tell of it."""
        loop = asyncio.get_running_loop()
        broken: asyncio.Future[tuple[str, str]] = loop.create_future()
        secret = secrets.token_bytes(32)
        address = await self._answer((await self._find()).expect_frontend.remote(secret))

        def on_beat(pulse: Pulse) -> None:
            with suppress(RuntimeError):  # the event loop may have ended
                loop.call_soon_threadsafe(self._hear, broken, pulse)

        def on_end(was_silent: bool, reason: str) -> None:
            logger.info("the life line to %s ended: %s", self.name, reason)
            cause = SILENT if was_silent else LOST
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_set, broken, (cause, self._detail(cause)))

        self._broken, self._last_error = broken, ""
        # Its waits are bounded. So nothing is left behind for long should this task end meanwhile.
        line = await loop.run_in_executor(self._threads, LifeLine, address, secret, self._silence_s, on_beat, on_end)
        try:
            return await broken
        finally:
            line.close()

    def _hear(self, broken: "asyncio.Future[tuple[str, str]]", pulse: Pulse) -> None:
        if broken is self._broken and not broken.done():
            self._listener.beat(self.name, pulse)
            self._mail()  # what was to be cancelled or released while the router was down

    def _mail(self) -> None:
        is_some = self._to_submit or self._to_cancel or self._to_release
        if is_some and self._broken is not None and (self._mailer is None or self._mailer.done()):
            self._mailer = asyncio.create_task(self._send_mail())

    async def _send_mail(self) -> None:
        """Send all mail. What is posted while a call is under way goes with the next one.

        Cancellations go first: an id among both was cancelled before it was used again. Releases
        make room for what comes in place of them.
        """
        while self._to_submit or self._to_cancel or self._to_release:
            requests, self._to_submit = self._to_submit, {}
            released, self._to_release = self._to_release, {}
            cancelled, self._to_cancel = self._to_cancel, {}
            try:
                router = await self._find()
                if cancelled:
                    await router.cancel.remote(self._frontend_id, cancelled)
                    cancelled = {}
                if released:
                    await router.release.remote(released)
                    released = {}
                if requests:
                    await router.submit.remote(self._frontend_id, list(requests.values()))
            except Exception as error:  # a defect, too, must not leave streams without an end
                self._break(error)
                return
            finally:  # again with the next mail, if this one was lost: the router may still live
                self._to_cancel = cancelled | self._to_cancel
                self._to_release = released | self._to_release

    async def _pull_while_open(self) -> None:
        while self._open:
            try:
                batch = await (await self._find()).pull.remote(self._frontend_id, self._receipt)
                if batch.number != self._receipt:
                    self._receipt = batch.number
                    self._open.difference_update(delta.request_id for delta in batch.deltas if delta.is_last)
                    self._listener.deliver(self.name, batch.deltas)
            except Exception as error:  # a defect, too, must not leave streams without an end
                self._break(error)
                return

    def _break(self, error: Exception) -> None:
        """A call failed: the router counts as down until it is reached anew."""
        detail = self._detail_of(error)
        if self._broken is not None:
            _set(self._broken, (LOST, detail))

    async def _find(self) -> ray.actor.ActorHandle:
        """The router's handle. Asking Ray for it blocks, so a thread does.

        Raises Unavailable, or whatever the look-up raised. Whoever asks after that looks anew.
        """
        if self._router is not None:
            return self._router
        if self._finding is None or self._finding.done():
            self._finding = asyncio.get_running_loop().run_in_executor(self._threads, self._look_up)
        finding = self._finding
        # Not `wait_for`: a look-up may fail by a TimeoutError of Ray's own.
        await asyncio.wait([finding], timeout=FIND_TIMEOUT_S)
        if not finding.done():
            raise Unavailable(
                f"Ray did not tell within {FIND_TIMEOUT_S:g} s where {self.name} is; its head may be down"
            )
        try:
            self._router = finding.result()
        except ValueError:
            raise Unavailable(f"{self.name} does not exist in namespace {self._namespace!r}") from None
        return self._router

    def _look_up(self) -> ray.actor.ActorHandle:
        return ray.get_actor(self.name, namespace=self._namespace)

    async def _answer(
        self, call: Awaitable[_Answer], broken: "asyncio.Future[tuple[str, str]] | None" = None
    ) -> _Answer:
        """The answer to a call, unless the life line breaks before: see `_broken`.

        Raises Unavailable if there is none in time, or whatever the call raised.
        """
        answer = asyncio.ensure_future(call)
        try:
            ends: list[asyncio.Future[Any]] = [answer] if broken is None else [answer, broken]
            await asyncio.wait(ends, timeout=CALL_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
        finally:
            answer.cancel()
        if broken is not None and broken.done():
            raise Unavailable(broken.result()[1])
        raise Unavailable(f"{self.name} did not answer within {CALL_TIMEOUT_S:g} s")

    def _detail_of(self, error: Exception) -> str:
        """What clients are told of an error. After one of Ray's the router is looked up anew."""
        if isinstance(error, Unavailable):
            return str(error)
        if not isinstance(error, ray.exceptions.RayError | ConnectionError):
            logger.error("talking to %s failed", self.name, exc_info=error)
        self._router = None
        if str(error) != self._last_error:  # else it is down still
            self._last_error = str(error)
            logger.warning("%s: %s", self.name, error)
        return self._detail(LOST)

    def _detail(self, cause: str) -> str:
        if cause == SILENT:
            return f"{self.name} has been silent for {self._silence_s:g} s"
        return f"{self.name} is down and being restarted"


def _set(future: "asyncio.Future[tuple[str, str]]", result: tuple[str, str]) -> None:
    if not future.done():
        future.set_result(result)

"""A frontend's way to a router actor: the one place where tokens, in batches, cross Ray."""

import asyncio
import logging
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import ray

from frontend.delta_stream import DeltaStream, DeltaStreams
from frontend.router_client import Readiness
from router.errors import Unavailable
from router.request import GenerationRequest, RequestLimits

logger = logging.getLogger(__name__)

RETRY_S = 0.25
READINESS_TIMEOUT_S = 5.0
# Ray itself has no deadline for telling where an actor is.
FIND_TIMEOUT_S = 5.0


class RayRouterClient:
    """A RouterClient over Ray.

    While requests run, one pull is always under way. All streams end if the router dies.

    `submit` and `cancel` are for the streams that `generate` makes.
    """

    def __init__(self, router_name: str, namespace: str, limits: RequestLimits) -> None:
        self._router_name, self._namespace = router_name, namespace
        self._limits = limits
        self._frontend_id = f"frontend-{uuid.uuid4().hex[:12]}"
        self._streams = DeltaStreams(self)
        self._receipt = -1  # no batch has this number
        self._puller: asyncio.Task[None] | None = None
        self._to_submit: dict[str, GenerationRequest] = {}
        self._to_cancel: dict[str, str] = {}  # request id -> how its end is counted
        self._to_release: dict[str, str] = {}  # call id -> what to keep
        self._mailer: asyncio.Task[None] | None = None
        self._router: ray.actor.ActorHandle | None = None
        self._finding: asyncio.Future[ray.actor.ActorHandle] | None = None
        # Of its own: a look-up may block for as long as Ray's head is away, and only one is made at a
        # time.
        self._finder = ThreadPoolExecutor(1, "find router")

    async def limits(self) -> RequestLimits:
        return self._limits

    async def readiness(self) -> Readiness:
        try:
            router = await self._find()
            answer: asyncio.Future[Readiness] = asyncio.ensure_future(router.readiness.remote())
            try:
                await asyncio.wait([answer], timeout=READINESS_TIMEOUT_S)
                if answer.done():
                    return answer.result()
            finally:
                answer.cancel()
        except Exception as error:
            return Readiness(False, str(self._unavailable(error)))
        return Readiness(False, f"{self._router_name} did not answer within {READINESS_TIMEOUT_S:g} s")

    def generate(self, requests: Sequence[GenerationRequest]) -> DeltaStream:
        return self._streams.new_stream(requests)

    def release(self, call_id: str, keep: str) -> None:
        self._streams.release(call_id, keep)
        self._to_release[call_id] = keep
        self._mail()

    def submit(self, request: GenerationRequest) -> None:
        """Send a request with the next mail, and pull until it has ended."""
        self._to_submit[request.request_id] = request
        self._mail()
        if self._puller is None or self._puller.done():
            self._puller = asyncio.create_task(self._pull_while_running())

    def cancel(self, request_id: str, ending: str) -> None:
        """Send a cancellation with the next mail, or withdraw a request that was not sent yet."""
        if self._to_submit.pop(request_id, None) is None:
            self._to_cancel[request_id] = ending
            self._mail()

    def _mail(self) -> None:
        if self._mailer is None or self._mailer.done():
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
                if released:
                    await router.release.remote(released)
                if requests:
                    await router.submit.remote(self._frontend_id, list(requests.values()))
            except Exception as error:  # a defect, too, must not leave streams without an end
                self._fail(error)
                # Again with the next mail: the router may still live.
                self._to_cancel = cancelled | self._to_cancel
                self._to_release = released | self._to_release
                return

    async def _pull_while_running(self) -> None:
        while self._streams.any_running:
            try:
                batch = await (await self._find()).pull.remote(self._frontend_id, self._receipt)
                if batch.number != self._receipt:
                    self._receipt = batch.number
                    self._streams.deliver(batch.deltas)
            except Exception as error:  # a defect, too, must not leave streams without an end
                self._fail(error)
                await asyncio.sleep(RETRY_S)

    def _fail(self, error: Exception) -> None:
        """End every stream: the router cannot be reached, and may have forgotten the requests."""
        self._streams.fail_all(self._unavailable(error))

    async def _find(self) -> ray.actor.ActorHandle:
        """The router's handle. Asking Ray for it blocks, so a thread does.

        Raises Unavailable, or whatever the look-up raised. Whoever asks after that looks anew.
        """
        if self._router is not None:
            return self._router
        if self._finding is None or self._finding.done():
            self._finding = asyncio.get_running_loop().run_in_executor(self._finder, self._look_up)
        finding = self._finding
        # Not `wait_for`: a look-up may fail by a TimeoutError of Ray's own.
        await asyncio.wait([finding], timeout=FIND_TIMEOUT_S)
        if not finding.done():
            raise Unavailable(
                f"Ray did not tell within {FIND_TIMEOUT_S:g} s where {self._router_name} is; its head may be down"
            )
        try:
            self._router = finding.result()
        except ValueError:
            raise Unavailable(f"{self._router_name} does not exist in namespace {self._namespace!r}") from None
        return self._router

    def _look_up(self) -> ray.actor.ActorHandle:
        return ray.get_actor(self._router_name, namespace=self._namespace)

    def _unavailable(self, error: Exception) -> Unavailable:
        """What clients are told of an error. The router is looked up anew after it."""
        if isinstance(error, Unavailable):
            return error
        if not isinstance(error, ray.exceptions.RayError):
            logger.error("talking to %s failed", self._router_name, exc_info=error)
        self._router = None
        logger.warning("%s: %s", self._router_name, error)
        return Unavailable(f"{self._router_name} is down and being restarted; try again")

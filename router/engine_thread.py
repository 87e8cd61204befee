"""Runs an engine in a thread of its own; requests and cancellations reach it from any thread."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experts.stuck_watch import StuckWatch
from kernels.cores import set_compute_threads
from router.counts.requests import EngineSnapshot, EngineStats
from router.engine import Engine
from router.errors import AlreadyExists, Internal, ResourceExhausted, RouterUnavailable
from router.request import GenerationRequest, TokenDelta

logger = logging.getLogger(__name__)

Deliver = Callable[[Sequence[TokenDelta]], None]


@dataclass(frozen=True)
class _Arrival:
    """arrived_s: by time.perf_counter; a request may wait for a step to end before the engine sees
    it."""

    request: GenerationRequest
    arrived_s: float


@dataclass(frozen=True)
class _Cancellation:
    """See EngineThread.cancel."""

    request_id: str
    ending: str
    on_forgotten: Callable[[str], None]


_Mail = _Arrival | _Cancellation


class EngineThread:
    """The engine's only caller.

    Mail is read between steps, and while a step waits for shards. So a cancellation takes effect
    within one step, however long that waits.

    deliver: called in the engine's thread with each step's deltas; it must not block.
    on_crash: called in the engine's thread when a defect has ended it, after every request was told.
    Also called in another thread, when the engine is stuck.
    stuck_after_s: how long one layer of a step may hang; None: for ever. Waiting for shards does
    not count.
    """

    def __init__(
        self,
        engine: Engine,
        deliver: Deliver,
        on_crash: Callable[[], None] = lambda: None,
        stuck_after_s: float | None = None,
    ) -> None:
        self._engine = engine
        self._deliver = deliver
        self._on_crash = on_crash
        self._mail_arrived = threading.Condition()
        self._mail: list[_Mail] = []
        self._stopping = False
        self._is_computing, self._looks_at_mail = False, 0
        self._watched = threading.Event()
        engine.call_while_waiting(self._look_at_mail)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        self._watch = StuckWatch(self._thread, self._progress, stuck_after_s, self._stuck)
        self._watched.set()

    @property
    def stats(self) -> EngineStats:
        """A snapshot; each number is right by itself."""
        return self._engine.stats

    @property
    def snapshot(self) -> EngineSnapshot:
        """Everything that is counted, in the same way; from one thread only."""
        return self._engine.snapshot

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request that `check_request` has passed; a refusal is delivered as its last delta.

        A request whose id is under way is not queued again. Deltas are told apart by id alone, so
        whoever listens goes on getting those of the first.
        """
        self._post(_Arrival(request, time.perf_counter()))

    def cancel(
        self, request_id: str, ending: str, on_forgotten: Callable[[str], None] = lambda request_id: None
    ) -> None:
        """Forget a request within one step, and count it as `ending`.

        Deltas already made may still be delivered.

        on_forgotten: called with the id in the engine's thread, after all of the request's deltas
        were delivered. A stopping engine does not call it.
        """
        self._post(_Cancellation(request_id, ending, on_forgotten))

    def stop(self, timeout_s: float) -> bool:
        """End after the step at hand; whether it ended in time.

        Requests that are left end as unavailable.
        """
        with self._mail_arrived:
            self._stopping = True
            self._mail_arrived.notify()
        self._engine.wake()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _post(self, mail: _Mail) -> None:
        with self._mail_arrived:
            if self._stopping:
                if isinstance(mail, _Arrival):
                    error = RouterUnavailable("the router is stopping")
                    self._deliver([TokenDelta(mail.request.request_id, error=error)])
                return
            self._mail.append(mail)
            self._mail_arrived.notify()
        self._engine.wake()

    def _run(self) -> None:
        try:
            set_compute_threads(self._engine.threads)
            self._serve()
        except Exception:
            logger.exception("the engine broke")
            self._end("the router broke; its log says why")
            self._on_crash()
        else:
            self._end("the router is stopping")
        finally:
            self._watched.wait()
            self._watch.close()

    def _progress(self) -> object:
        return (self._looks_at_mail, self._engine.progress) if self._is_computing else None

    def _stuck(self) -> None:
        logger.error("a layer hangs: this router ends itself")
        self._on_crash()

    def _end(self, reason: str) -> None:
        """Nobody may be left waiting, nor anything be accepted from now on."""
        with self._mail_arrived:
            self._stopping = True
            mail, self._mail = self._mail, []
        error = RouterUnavailable(reason)
        deltas = self._engine.fail_all(error)
        deltas += [TokenDelta(item.request.request_id, error=error) for item in mail if isinstance(item, _Arrival)]
        if deltas:
            self._deliver(deltas)

    def _serve(self) -> None:
        while True:
            with self._mail_arrived:
                self._mail_arrived.wait_for(lambda: self._mail or self._stopping or self._engine.has_work)
                if self._stopping:
                    return
            self._is_computing = True
            self._read_mail(self._engine.step)
            self._is_computing = False

    def _look_at_mail(self) -> None:
        """What a step does while it waits for shards. Raises RouterUnavailable if the step must end."""
        if self._stopping:
            raise RouterUnavailable("the router is stopping")
        self._looks_at_mail += 1
        self._read_mail(self._engine.end_expired)

    def _read_mail(self, then: Callable[[], list[TokenDelta]]) -> None:
        """Tell the engine of the mail, call `then`, and deliver what comes of both."""
        with self._mail_arrived:
            mail, self._mail = self._mail, []
        deltas = self._handle(mail) + then()
        if deltas:
            self._deliver(deltas)
        for item in mail:
            if isinstance(item, _Cancellation):
                item.on_forgotten(item.request_id)

    def _handle(self, mail: Sequence[_Mail]) -> list[TokenDelta]:
        """Tell the engine of it. The deltas are of requests that it refuses."""
        refusals = []
        for item in mail:
            if isinstance(item, _Cancellation):
                self._engine.cancel(item.request_id, item.ending)
                continue
            try:
                self._engine.submit(item.request, item.arrived_s)
            except AlreadyExists:
                logger.warning("request %s came twice; the first goes on", item.request.request_id)
            except ResourceExhausted as error:
                refusals.append(TokenDelta(item.request.request_id, error=error))
            except Exception as error:
                logger.exception("request %s cannot be queued", item.request.request_id)
                reason = f"queueing the request failed ({type(error).__name__}); the router's log says why"
                refusals.append(TokenDelta(item.request.request_id, error=Internal(reason)))
        return refusals

"""Serves one shard to any number of routers.

One thread computes their requests in the order of arrival, and those of one layer that wait
together in one go.

It never waits for a fuller batch, and drops the requests of routers whose link has ended.
"""

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence

import torch

from experts.connection import Connection
from experts.endpoint import Endpoint, Liveness
from experts.errors import LinkDown, RefusalCode, ShardRefused
from experts.groups.row_channel import RowChannel
from experts.merged import Merged, can_join, is_sound
from experts.shard import ExpertShard
from experts.stuck_watch import StuckWatch
from experts.wire import Kind, Message, WireFormat
from kernels.cores import set_compute_threads

logger = logging.getLogger(__name__)

_Request = tuple[Endpoint, Message]


class ShardServer:
    """The links of one shard and the thread that computes for them.

    Heartbeats come from other threads, so a shard whose computing thread has ended, or hangs, would
    look alive for ever. If a defect ends that thread, or if it is stuck, this calls on_crash, and
    then closes all links.
    """

    def __init__(
        self,
        shard: ExpertShard,
        device: torch.device,
        on_crash: Callable[[], None] = lambda: None,
        *,
        is_loaded: bool = True,
        prepare: Callable[[], None] = lambda: None,
        stuck_after_s: float | None = None,
    ) -> None:
        """is_loaded: whether the shard holds all that it should; else `loaded` is to be called.

        prepare: called in the computing thread before the first request. stuck_after_s: how long a
        computation may hang; None: for ever.
        """
        self.shard = shard
        self._device = device
        self._on_crash, self._prepare = on_crash, prepare
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._endpoints: set[Endpoint] = set()
        self._endpoints_lock = threading.Lock()
        self._is_loaded = is_loaded
        self._computations = 0
        self._is_computing = False
        self._watched, self._prepared = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()
        self._watch = StuckWatch(self._thread, self._progress, stuck_after_s, self._stuck)
        self._watched.set()

    @property
    def link_names(self) -> tuple[str, ...]:
        """Links that work now."""
        with self._endpoints_lock:
            return tuple(endpoint.name for endpoint in self._endpoints)

    def serve(
        self, connection: Connection, wire: WireFormat, liveness: Liveness, name: str, rows: RowChannel | None = None
    ) -> None:
        """Serve the router at the other end of `connection` until that link ends."""
        endpoint: Endpoint | None = None
        created = threading.Event()

        def on_message(message: Message) -> None:
            created.wait()
            assert endpoint is not None
            self._requests.put((endpoint, message))

        def on_down(reason: str) -> None:
            logger.info("link %s ended: %s", name, reason)
            with self._endpoints_lock:
                if endpoint is not None:
                    self._endpoints.discard(endpoint)

        endpoint = Endpoint(connection, wire, liveness, on_message, on_down, name, rows)
        with self._endpoints_lock:
            if endpoint.down_reason is None:
                self._endpoints.add(endpoint)
            if self._is_loaded:
                _tell_loaded(endpoint)
        created.set()

    def loaded(self) -> None:
        """Tell every router, now and later, that the shard holds all that it should, once it is prepared, too."""
        self._prepared.wait()
        with self._endpoints_lock:
            self._is_loaded = True
            for endpoint in self._endpoints:
                _tell_loaded(endpoint)

    def close(self) -> None:
        """End all links and the thread."""
        self._close_links()
        self._requests.put(None)
        self._thread.join(10.0)

    def _close_links(self) -> None:
        with self._endpoints_lock:
            endpoints = list(self._endpoints)
        for endpoint in endpoints:
            endpoint.close()

    def _run(self) -> None:
        try:
            self._compute()
        except Exception:
            logger.exception("the shard broke")
            self._crash()
        finally:
            self._watched.wait()
            self._watch.close()

    def _crash(self) -> None:
        try:
            self._on_crash()
        finally:
            self._close_links()

    def _progress(self) -> object:
        return (self._computations, self.shard.progress) if self._is_computing else None

    def _stuck(self) -> None:
        logger.error("a computation hangs: this shard ends itself")
        self._crash()

    def _compute(self) -> None:
        set_compute_threads(self.shard.kernels.cores.threads)
        self._is_computing = True
        self._prepare()
        self._is_computing = False
        self._prepared.set()
        backlog: deque[_Request] = deque()
        while True:
            while not backlog or not self._requests.empty():
                item = self._requests.get()
                if item is None:
                    return
                backlog.append(item)
            batch = _next_batch(backlog)
            if batch:
                self._is_computing = True
                self._answer_all(batch)
                self._computations += 1
                self._is_computing = False

    def _answer_all(self, batch: Sequence[_Request]) -> None:
        inline = {endpoint: endpoint.wire.rows_inline for endpoint, _ in batch}
        if len(batch) > 1:
            try:
                merged = Merged([request for _, request in batch])
                y_ND = self._computed(merged)
            except Exception as error:  # of one of them, perhaps: computed apart, each gets its own answer
                logger.debug("%d merged requests failed: %r", len(batch), error)
            else:
                for (endpoint, request), answer_ND in zip(batch, merged.split(y_ND), strict=True):
                    _post(endpoint, _result(request, answer_ND, rows_inline=inline[endpoint]))
                return
        for endpoint, request in batch:
            _post(endpoint, self._answer(request, rows_inline=inline[endpoint]))

    def _computed(self, rows: Message | Merged) -> torch.Tensor:
        assert rows.x_ND is not None
        return self.shard.compute(rows.layer, rows.experts, rows.versions, rows.counts, rows.x_ND.to(self._device))

    def _answer(self, request: Message, *, rows_inline: bool) -> Message:
        if request.kind is not Kind.ROWS or request.x_ND is None:  # a defect of that router, which must hear of it
            rows = 0 if request.x_ND is None else len(request.x_ND)
            text = f"got {request.kind.name} with {rows} rows; a shard computes ROWS, at least one"
            return Message(Kind.REFUSAL, request.sequence, code=RefusalCode.COMPUTE_FAILED, text=text)
        try:
            return _result(request, self._computed(request), rows_inline=rows_inline)
        except ShardRefused as refusal:
            return Message(Kind.REFUSAL, request.sequence, code=refusal.code, text=str(refusal))
        except Exception as error:
            # A defect or a lack of memory: the router must hear of it, and other requests must go on.
            logger.exception("computing failed")
            text = f"computing failed: {error}"
            return Message(Kind.REFUSAL, request.sequence, code=RefusalCode.COMPUTE_FAILED, text=text)


def _next_batch(backlog: deque[_Request]) -> list[_Request]:
    """Take the oldest request out of the backlog, and all that can be computed together with it."""
    batch, left = [backlog.popleft()], list(backlog)
    backlog.clear()
    mergeable = batch[0][1].kind is Kind.ROWS and is_sound(batch[0][1])
    for endpoint, request in left:
        if mergeable and request.kind is Kind.ROWS and is_sound(request) and can_join(request, [r for _, r in batch]):
            batch.append((endpoint, request))
        else:
            backlog.append((endpoint, request))
    return [(endpoint, request) for endpoint, request in batch if endpoint.down_reason is None]


def _result(request: Message, y_ND: torch.Tensor, *, rows_inline: bool) -> Message:
    # To host memory here, because whoever sends may not wait for a device.
    return Message(Kind.RESULT, request.sequence, x_ND=y_ND.cpu() if rows_inline else y_ND)


def _tell_loaded(endpoint: Endpoint) -> None:
    _post(endpoint, Message(Kind.LOADED))


def _post(endpoint: Endpoint, message: Message) -> None:
    try:
        endpoint.post(message)
    except LinkDown:
        pass  # that router is gone, and its rows with it

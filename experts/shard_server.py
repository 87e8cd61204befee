"""Serves one shard to any number of routers.

One thread computes their requests in the order of arrival.

It never waits for a fuller batch, and drops the requests of routers whose link has ended.
"""

import logging
import queue
import threading
from collections.abc import Callable

import torch

from experts.connection import Connection
from experts.endpoint import Endpoint, Liveness
from experts.errors import LinkDown, RefusalCode, ShardRefused
from experts.groups.row_channel import RowChannel
from experts.shard import ExpertShard
from experts.wire import Kind, Message, WireFormat
from kernels.cores import set_compute_threads

logger = logging.getLogger(__name__)


class ShardServer:
    """The links of one shard and the thread that computes for them.

    Heartbeats come from other threads, so a shard whose computing thread has ended would look
    alive for ever. If a defect ends that thread, it calls on_crash, and then closes all links.
    """

    def __init__(self, shard: ExpertShard, device: torch.device, on_crash: Callable[[], None] = lambda: None) -> None:
        self.shard = shard
        self._device = device
        self._on_crash = on_crash
        self._requests: queue.SimpleQueue[tuple[Endpoint, Message] | None] = queue.SimpleQueue()
        self._endpoints: set[Endpoint] = set()
        self._endpoints_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

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
        created.set()

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
            try:
                self._on_crash()
            finally:
                self._close_links()

    def _compute(self) -> None:
        set_compute_threads(self.shard.kernels.cores.threads)
        while (item := self._requests.get()) is not None:
            endpoint, request = item
            if endpoint.down_reason is not None:
                continue
            try:
                endpoint.post(self._answer(request, rows_inline=endpoint.wire.rows_inline))
            except LinkDown:
                pass  # that router is gone, and its rows with it

    def _answer(self, request: Message, *, rows_inline: bool) -> Message:
        if request.kind is not Kind.ROWS or request.x_ND is None:  # a defect of that router, which must hear of it
            rows = 0 if request.x_ND is None else len(request.x_ND)
            text = f"got {request.kind.name} with {rows} rows; a shard computes ROWS, at least one"
            return Message(Kind.REFUSAL, request.sequence, code=RefusalCode.COMPUTE_FAILED, text=text)
        try:
            y_ND = self.shard.compute(
                request.layer,
                request.experts,
                request.versions,
                request.counts,
                request.x_ND.to(self._device),
            )
            if rows_inline:  # here, because whoever sends may not wait for a device
                y_ND = y_ND.cpu()
        except ShardRefused as refusal:
            return Message(Kind.REFUSAL, request.sequence, code=refusal.code, text=str(refusal))
        except Exception as error:
            # A defect or a lack of memory: the router must hear of it, and other requests must go on.
            logger.exception("computing failed")
            text = f"computing failed: {error}"
            return Message(Kind.REFUSAL, request.sequence, code=RefusalCode.COMPUTE_FAILED, text=text)
        return Message(Kind.RESULT, request.sequence, x_ND=y_ND)

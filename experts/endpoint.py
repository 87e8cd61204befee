"""One end of a link between processes: framed messages, a heartbeat, and the decision that the peer is dead.

One thread receives. It always has a receive posted, so no send waits for a busy peer, and sends
that cross cannot deadlock. Another thread sends what was posted, and heartbeats while nothing is.
Neither computes, and whoever posts never waits for a peer. A peer that was silent for silence_s is
dead. One that is merely slow still sends heartbeats, or pieces of a long message.

Rows that travel beside their message are waited for by a third thread, which has no deadline of its
own: they may come long after the message, because the peer's GPU is still computing them. That is
slowness, and the receiving thread goes on to read heartbeats.
"""

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from experts.errors import LinkDown
from experts.groups.gloo import Pair
from experts.groups.row_channel import RowChannel
from experts.pieces import PIECE_BYTES, Assembly, pieces
from experts.wire import Kind, Message, WireFormat

logger = logging.getLogger(__name__)

_HEARTBEAT = Message(Kind.HEARTBEAT)


@dataclass(frozen=True)
class Liveness:
    """heartbeat_s: time between heartbeats.

    silence_s: after so long without a message, the peer is dead.
    """

    heartbeat_s: float
    silence_s: float


class Endpoint:
    """Sends what is posted, and calls on_message for each message that arrives, except heartbeats.

    Both callbacks run in threads that receive, so on_message must return fast. on_down is called
    once, with the reason, when either end has ended the link.
    """

    def __init__(
        self,
        pair: Pair,
        wire: WireFormat,
        liveness: Liveness,
        on_message: Callable[[Message], None],
        on_down: Callable[[str], None],
        name: str,
        rows: RowChannel | None = None,
    ) -> None:
        """rows: carries the rows where wire.rows_inline is false."""
        assert (rows is None) == wire.rows_inline
        self.name = name
        self._pair, self._wire, self._liveness, self._rows = pair, wire, liveness, rows
        self._on_message, self._on_down = on_message, on_down
        self._outbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        """None only wakes the sending thread."""
        self._announced: queue.SimpleQueue[tuple[Message, int] | None] = queue.SimpleQueue()
        """Messages whose rows travel beside them, with the number of rows; None only wakes the thread."""
        self.ended = threading.Event()
        """Set once the link has ended; down_reason then says why."""
        self.down_reason: str | None = None
        """None while the link works; else why it ended."""
        posted = threading.Event()
        self._threads = [
            threading.Thread(target=self._receive_all, args=(posted,), name=f"receive {name}", daemon=True),
            threading.Thread(target=self._send_all, name=f"send {name}", daemon=True),
        ]
        if rows is not None:
            self._threads.append(
                threading.Thread(target=self._take_rows, args=(rows,), name=f"rows {name}", daemon=True)
            )
        for thread in self._threads:
            thread.start()
        posted.wait()

    def post(self, message: Message) -> None:
        """Send one message, after those posted before; returns at once. Raises LinkDown if the link has ended.

        Should the link end later, the message is lost; on_down tells. Its rows must not change
        any more.
        """
        self._wire.check(message)
        if self.down_reason is not None:
            raise LinkDown(self.down_reason)
        self._outbox.put(message)

    def close(self) -> None:
        """End the link, at both ends, and this end's threads.

        Not to be called from on_message or on_down.
        """
        self._end("closed")
        self._close_channels()
        for thread in self._threads:
            thread.join(self._liveness.silence_s + 5.0)

    def _receive_all(self, posted: threading.Event) -> None:
        # Two buffers: the next receive is posted before the last piece is looked at.
        buffers = [torch.zeros(PIECE_BYTES, dtype=torch.uint8) for _ in range(2)]
        assembly = Assembly(self._wire.capacity)
        with self._ending("lost"):
            receive = self._pair.post_receive(buffers[0])
            posted.set()
            while not self.ended.is_set():
                receive.wait(self._liveness.silence_s)
                receive = self._pair.post_receive(buffers[1])
                packed = assembly.add(buffers[0])
                buffers.reverse()
                if packed is not None:
                    self._take(packed)
        posted.set()
        self._on_down(self.down_reason or "lost")

    def _take(self, packed: torch.Tensor) -> None:
        is_in_a_receive_buffer = len(packed) <= PIECE_BYTES
        message = self._wire.unpack(packed, copy=is_in_a_receive_buffer)
        if message.kind is Kind.HEARTBEAT:
            return
        if self._rows is None:
            self._on_message(message)
        else:
            self._announced.put((message, self._wire.row_count(packed)))

    def _take_rows(self, rows: RowChannel) -> None:
        with self._ending("lost"):
            while (announced := self._announced.get()) is not None:
                message, count = announced
                self._on_message(replace(message, x_ND=rows.receive(count)) if count else message)

    def _send_all(self) -> None:
        buffer = self._wire.new_buffer()
        with self._ending("sending failed"):
            while True:
                message = self._next_message()
                if self.ended.is_set():
                    return
                for piece in pieces(self._wire.pack(message, buffer)):
                    self._pair.send(piece, self._liveness.silence_s)
                if self._rows is not None and message.x_ND is not None:
                    self._rows.send(message.x_ND)

    @contextmanager
    def _ending(self, how: str) -> Iterator[None]:
        """What ends this block ends the link, and wakes its other threads."""
        try:
            yield
        except ConnectionError as error:
            self._end(f"{how}: {error}")
        except Exception as error:
            logger.exception("link %s broke", self.name)
            self._end(f"broke: {error!r}")
        finally:
            self._close_channels()

    def _next_message(self) -> Message:
        try:
            return self._outbox.get(timeout=self._liveness.heartbeat_s) or _HEARTBEAT
        except queue.Empty:
            return _HEARTBEAT

    def _close_channels(self) -> None:
        self._pair.close()
        if self._rows is not None:
            self._rows.close()

    def _end(self, reason: str) -> None:
        if self.down_reason is None:
            self.down_reason = reason
        self.ended.set()
        self._outbox.put(None)
        self._announced.put(None)

"""One end of a link between processes: framed messages, a heartbeat, and the decision that the peer is dead.

One thread receives, and is always ready to, so that no send waits for a busy peer, and sends that
cross cannot deadlock. Another thread sends what was posted, and heartbeats while nothing is.
Neither computes, and whoever posts never waits for a peer. A peer from which no byte came for
silence_s is dead, or which took none. One that is merely slow still sends heartbeats, or bytes of a
long message.

Rows that travel beside their message are sent and waited for by two threads more, which have no
deadline: they may come long after the message, because the peer's GPU is still computing them. That
is slowness, and heartbeats go on meanwhile.
"""

import logging
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

from experts.connection import Connection, PeerSilent
from experts.errors import LinkDown
from experts.groups.row_channel import RowChannel
from experts.wire import Kind, Message, WireFormat

logger = logging.getLogger(__name__)

_HEARTBEAT = Message(Kind.HEARTBEAT)


@dataclass(frozen=True)
class Liveness:
    """heartbeat_s: time between heartbeats.

    silence_s: after so long without a byte, the peer is dead.
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
        connection: Connection,
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
        self.wire = wire
        self._connection, self._liveness, self._rows = connection, liveness, rows
        self._on_message, self._on_down = on_message, on_down
        self._outbox: queue.SimpleQueue[Callable[[], Message | None]] = queue.SimpleQueue()
        """What gives each message that was posted; None if nobody wants it to be sent any more."""
        self._announced: queue.SimpleQueue[tuple[Message, int] | None] = queue.SimpleQueue()
        """Messages whose rows come beside them, with the number of rows; None ends the thread."""
        self._leaving: queue.SimpleQueue[torch.Tensor | None] = queue.SimpleQueue()
        """Rows to be sent beside messages that were sent; None ends the thread."""
        self.ended = threading.Event()
        """Set once the link has ended; down_reason then says why."""
        self.down_reason: str | None = None
        """None while the link works; else why it ended."""
        self.down_kind = ""
        """How it ended, for counting: "lost" by the peer, "silent", "broke" by a defect, or "closed" here."""
        connection.allow_silence(liveness.silence_s)
        doing = {"receive": self._receive_all, "send": self._send_all}
        if rows is not None:
            doing |= {"receive rows": partial(self._receive_rows, rows), "send rows": partial(self._send_rows, rows)}
        self._threads = [
            threading.Thread(target=target, name=f"{what} {name}", daemon=True) for what, target in doing.items()
        ]
        for thread in self._threads:
            thread.start()

    def post(self, message: Message, *, while_held: bool = False) -> None:
        """Send one message, after those posted before; returns at once. Raises LinkDown if the link has ended.

        Should the link end later, the message is lost; on_down tells. Its rows must be in host
        memory, unless they travel beside it, and must not change any more.
        while_held: once the caller has dropped the message, it is not sent.
        """
        self.wire.check(message)
        if self.down_reason is not None:
            raise LinkDown(self.down_reason)
        self._outbox.put(weakref.ref(message) if while_held else lambda: message)

    def end(self) -> None:
        """End the link, at both ends. Does not wait for this end's threads."""
        self._end("closed", "closed")
        self._close_channels()

    def close(self) -> None:
        """End the link, at both ends, and this end's threads.

        Not to be called from on_message or on_down.
        """
        self.end()
        for thread in self._threads:
            thread.join(self._liveness.silence_s + 5.0)

    def _receive_all(self) -> None:
        with self._ending("lost"):
            while not self.ended.is_set():
                message, rows = self.wire.read(self._connection.read)
                if message.kind is Kind.HEARTBEAT:
                    continue
                if self._rows is None:
                    self._on_message(message)
                else:
                    self._announced.put((message, rows))
        self._on_down(self.down_reason or "lost")

    def _receive_rows(self, channel: RowChannel) -> None:
        with self._ending("lost"):
            while (announced := self._announced.get()) is not None:
                message, rows = announced
                self._on_message(replace(message, x_ND=channel.receive(rows)) if rows else message)

    def _send_all(self) -> None:
        with self._ending("sending failed"):
            while True:
                message = self._next_message()
                if self.ended.is_set():
                    return
                if message is None:
                    continue
                self._connection.send(self.wire.pack(message))
                if self._rows is not None and message.x_ND is not None:
                    self._leaving.put(message.x_ND)

    def _send_rows(self, channel: RowChannel) -> None:
        with self._ending("sending failed"):
            while (x_ND := self._leaving.get()) is not None:
                channel.send(x_ND)

    @contextmanager
    def _ending(self, how: str) -> Iterator[None]:
        """What ends this block ends the link, and wakes its other threads."""
        try:
            yield
        except ConnectionError as error:
            self._end(f"{how}: {error}", "silent" if isinstance(error, PeerSilent) else "lost")
        except Exception as error:
            logger.exception("link %s broke", self.name)
            self._end(f"broke: {error!r}", "broke")
        finally:
            self._close_channels()

    def _next_message(self) -> Message | None:
        """None if it is not wanted any more."""
        try:
            return self._outbox.get(timeout=self._liveness.heartbeat_s)()
        except queue.Empty:
            return _HEARTBEAT

    def _close_channels(self) -> None:
        self._connection.close()
        if self._rows is not None:
            self._rows.close()

    def _end(self, reason: str, kind: str) -> None:
        if self.down_reason is None:
            self.down_kind = kind
            self.down_reason = reason
        self.ended.set()
        self._outbox.put(lambda: None)
        self._announced.put(None)
        self._leaving.put(None)

"""The router's end of a link to a shard in another process."""

import itertools
import threading
import time
import weakref
from collections.abc import Callable

import torch

from experts.bell import Bell
from experts.connection import Connection
from experts.endpoint import Endpoint, Liveness
from experts.errors import LinkDown, refusal
from experts.groups.row_channel import RowChannel
from experts.link import ExpertRows, Reply
from experts.wire import Kind, Message, WireFormat


class GroupLink:
    """Sends requests and matches replies to them by sequence number.

    A reply that nobody holds any more is dropped. How long to wait is the caller's affair: a
    living shard may take any time.
    """

    def __init__(
        self,
        connection: Connection,
        wire: WireFormat,
        liveness: Liveness,
        bell: Bell,
        device: torch.device,
        name: str,
        rows: RowChannel | None = None,
        on_loaded: Callable[[], None] = lambda: None,
    ) -> None:
        """bell: rung for every reply, and when the link ends. device: where answers are wanted.

        on_loaded: called in a receiving thread once the shard says that it has loaded.
        """
        self._bell, self._on_loaded = bell, on_loaded
        self._device, self._rows_inline = device, wire.rows_inline
        self._sequence = itertools.count(1)
        self._awaited_lock = threading.Lock()
        # Weak references: a step that was given up drops its replies, and their answers with them.
        self._awaited: weakref.WeakValueDictionary[int, _GroupReply] = weakref.WeakValueDictionary()
        self.is_loaded = False
        self._endpoint = Endpoint(connection, wire, liveness, self._on_message, self._on_down, name, rows)

    @property
    def down_reason(self) -> str | None:
        return self._endpoint.down_reason

    @property
    def down_kind(self) -> str:
        """See Endpoint.down_kind."""
        return self._endpoint.down_kind

    @property
    def device(self) -> torch.device:
        """Where answers are wanted."""
        return self._device

    def request(self, rows: ExpertRows) -> Reply:
        """Send the rows, which must not change any more. Raises LinkDown.

        If the reply is dropped before they have left, they never will.
        """
        sequence = next(self._sequence)
        x_ND = rows.x_ND.cpu() if self._rows_inline else rows.x_ND
        message = Message(Kind.ROWS, sequence, rows.layer, rows.experts, rows.versions, rows.counts, x_ND)
        reply = _GroupReply(self, message)
        with self._awaited_lock:
            self._awaited[sequence] = reply
        self._endpoint.post(message, while_held=True)
        return reply

    def wait_until_down(self) -> str:
        """Return once the link has ended, however long that takes, with the reason."""
        self._endpoint.ended.wait()
        assert self._endpoint.down_reason is not None
        return self._endpoint.down_reason

    def end(self) -> None:
        """End the link without waiting for its threads; `close` does that, too."""
        self._endpoint.end()

    def close(self) -> None:
        self._endpoint.close()

    def _on_message(self, message: Message) -> None:
        if message.kind is Kind.LOADED:
            self.is_loaded = True
            self._on_loaded()
            return
        with self._awaited_lock:
            reply = self._awaited.get(message.sequence)
        if reply is not None:
            reply.answered_s = time.monotonic()
            reply.answer = message
            self._bell.ring()

    def _on_down(self, reason: str) -> None:
        self._bell.ring()


class _GroupReply:
    """asked: what was sent, or will be while this lives. answer: None until it has come."""

    def __init__(self, link: GroupLink, asked: Message) -> None:
        self._link, self.asked = link, asked
        self.answer: Message | None = None
        self.answered_s: float | None = None

    @property
    def done(self) -> bool:
        return self.answer is not None or self._link.down_reason is not None

    def take(self) -> torch.Tensor:
        """On the router's device. Raises LinkDown, NotHeld, ComputeFailed."""
        answer = self.answer
        if answer is None:
            raise LinkDown(self._link.down_reason)
        if answer.kind is Kind.REFUSAL:
            assert answer.code is not None
            raise refusal(answer.code, answer.text)
        assert answer.x_ND is not None
        return answer.x_ND.to(self._link.device)

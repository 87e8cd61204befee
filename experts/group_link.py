"""The router's end of a link to a shard in another process."""

import itertools
import threading
import weakref

import torch

from experts.connection import Connection
from experts.endpoint import Endpoint, Liveness
from experts.errors import LinkDown, refusal
from experts.groups.row_channel import RowChannel
from experts.link import ExpertRows, Reply
from experts.wire import Kind, Message, WireFormat


class GroupLink:
    """Sends requests and matches replies to them by sequence number.

    A reply that nobody holds any more is dropped.

    reply_deadline_s: how long a living shard may take for one request. Missing it does not end the
    link.
    """

    def __init__(
        self,
        connection: Connection,
        wire: WireFormat,
        liveness: Liveness,
        reply_deadline_s: float,
        device: torch.device,
        name: str,
        rows: RowChannel | None = None,
    ) -> None:
        self._reply_deadline_s = reply_deadline_s
        self._device, self._rows_inline = device, wire.rows_inline
        self._sequence = itertools.count(1)
        self._changed = threading.Condition()
        # Weak references: a step that was given up drops its replies, and their answers with them.
        self._awaited: weakref.WeakValueDictionary[int, _GroupReply] = weakref.WeakValueDictionary()
        self._endpoint = Endpoint(connection, wire, liveness, self._on_message, self._on_down, name, rows)

    @property
    def down_reason(self) -> str | None:
        return self._endpoint.down_reason

    def request(self, rows: ExpertRows) -> Reply:
        """Send the rows, which must not change any more. Raises LinkDown.

        If the reply is dropped before they have left, they never will.
        """
        sequence = next(self._sequence)
        x_ND = rows.x_ND.cpu() if self._rows_inline else rows.x_ND
        message = Message(Kind.ROWS, sequence, rows.layer, rows.experts, rows.versions, rows.counts, x_ND)
        reply = _GroupReply(self, message)
        with self._changed:
            self._awaited[sequence] = reply
        self._endpoint.post(message, while_held=True)
        return reply

    def wait_until_down(self) -> str:
        """Return once the link has ended, however long that takes, with the reason."""
        self._endpoint.ended.wait()
        assert self._endpoint.down_reason is not None
        return self._endpoint.down_reason

    def close(self) -> None:
        self._endpoint.close()

    def answer_to(self, reply: "_GroupReply") -> torch.Tensor:
        """The answer, on the router's device. Raises LinkDown, NotHeld, ComputeFailed."""
        with self._changed:
            self._changed.wait_for(
                lambda: reply.message is not None or self.down_reason is not None, self._reply_deadline_s
            )
            message = reply.message
        if message is None:
            reason = self.down_reason or f"no answer within {self._reply_deadline_s:g} s, though it is alive"
            raise LinkDown(reason)
        if message.kind is Kind.REFUSAL:
            assert message.code is not None
            raise refusal(message.code, message.text)
        assert message.x_ND is not None
        return message.x_ND.to(self._device)

    def _on_message(self, message: Message) -> None:
        with self._changed:
            reply = self._awaited.get(message.sequence)
            if reply is not None:
                reply.message = message
                self._changed.notify_all()

    def _on_down(self, reason: str) -> None:
        with self._changed:
            self._changed.notify_all()


class _GroupReply:
    """asked: what was sent, or will be while this lives. message: the answer, once it has come."""

    def __init__(self, link: GroupLink, asked: Message) -> None:
        self._link, self.asked = link, asked
        self.message: Message | None = None

    def wait(self) -> torch.Tensor:
        return self._link.answer_to(self)

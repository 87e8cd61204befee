"""The router's end of a link to a shard in another process."""

import itertools
import threading

import torch

from experts.endpoint import Endpoint, Liveness
from experts.errors import LinkDown, ShardRefused
from experts.link import ExpertRows, Reply
from experts.process_group import Pair, RowChannel
from experts.wire import Kind, Message, WireFormat


class GroupLink:
    """Requests out, replies in, matched by sequence number; a reply that nobody waits for any more is dropped.

    reply_deadline_s: how long a living shard may take over one request. Missing it does not end the link.
    """

    def __init__(
        self,
        pair: Pair,
        wire: WireFormat,
        liveness: Liveness,
        reply_deadline_s: float,
        device: torch.device,
        name: str,
        rows: RowChannel | None = None,
    ) -> None:
        self._reply_deadline_s = reply_deadline_s
        self._device = device
        self._sequence = itertools.count(1)
        self._changed = threading.Condition()
        self._awaited: dict[int, Message | None] = {}
        self._endpoint = Endpoint(pair, wire, liveness, self._on_message, self._on_down, name, rows)

    @property
    def down_reason(self) -> str | None:
        return self._endpoint.down_reason

    def request(self, rows: ExpertRows) -> Reply:
        """Send the rows. Raises LinkDown."""
        sequence = next(self._sequence)
        with self._changed:
            self._awaited[sequence] = None
        try:
            self._endpoint.send(
                Message(Kind.ROWS, sequence, rows.placement_version, rows.layer, rows.experts, rows.counts, rows.x_ND)
            )
        except LinkDown:
            with self._changed:
                del self._awaited[sequence]
            raise
        return _GroupReply(self, sequence)

    def close(self) -> None:
        self._endpoint.close()

    def wait(self, sequence: int) -> torch.Tensor:
        """The reply to request `sequence`, on the router's device. Raises LinkDown, ShardRefused."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._awaited[sequence] is not None or self.down_reason is not None, self._reply_deadline_s
            )
            message = self._awaited.pop(sequence)
        if message is None:
            reason = self.down_reason or f"no answer within {self._reply_deadline_s:g} s, though it is alive"
            raise LinkDown(reason)
        if message.kind is Kind.REFUSAL:
            raise ShardRefused(message.text)
        assert message.x_ND is not None
        return message.x_ND.to(self._device)

    def _on_message(self, message: Message) -> None:
        with self._changed:
            if message.sequence in self._awaited:
                self._awaited[message.sequence] = message
                self._changed.notify_all()

    def _on_down(self, reason: str) -> None:
        with self._changed:
            self._changed.notify_all()


class _GroupReply:
    def __init__(self, link: GroupLink, sequence: int) -> None:
        self._link = link
        self._sequence = sequence

    def wait(self) -> torch.Tensor:
        return self._link.wait(self._sequence)

"""Cuts messages into pieces of bounded size, and puts them together again.

A Gloo message counts as received only when all of it has arrived. If one took longer than the
heartbeat's deadline, a slow transfer would look like death. So each piece is a message to Gloo, and
a sign of life. Receive buffers are as small as a piece, too.

A message starts with wire.HEADER_BYTES, whose last number is its length. Each further piece starts
with a header of its own, of kind CONTINUATION. It is written over bytes that were sent before, so
nothing is copied at the sender.
"""

from collections.abc import Iterator

import torch

from experts.wire import HEADER_BYTES, Kind, message_bytes, message_kind, write_header

PIECE_BYTES = 512 * 2**10
"""With 0.5 s of patience, a link of 1 MB/s is alive. On loopback this size costs nothing; half of it costs a third."""


def pieces(message: torch.Tensor) -> Iterator[torch.Tensor]:
    """The pieces of `message` (uint8, as WireFormat.pack makes it), whose bytes are overwritten on the way.

    Each must have been sent before the next is asked for.
    """
    yield message[:PIECE_BYTES]
    for first in range(PIECE_BYTES, len(message), PIECE_BYTES - HEADER_BYTES):
        piece = message[first - HEADER_BYTES : first - HEADER_BYTES + PIECE_BYTES]
        write_header(piece, Kind.CONTINUATION, total=len(piece))
        yield piece


class Assembly:
    """Puts the pieces that arrive on one link together."""

    def __init__(self, max_bytes: int) -> None:
        """max_bytes: length of the longest message."""
        self._max_bytes = max_bytes
        self._message: torch.Tensor | None = None
        self._filled = 0

    def add(self, piece: torch.Tensor) -> torch.Tensor | None:
        """The message that `piece` completes; None if more must come.

        piece: a receive buffer of PIECE_BYTES, which a message of one piece is a part of. Raises
        ValueError if the pieces make no message.
        """
        if self._message is None:
            total = message_bytes(piece)
            if message_kind(piece) == Kind.CONTINUATION or not HEADER_BYTES <= total <= self._max_bytes:
                raise ValueError(f"a message begins with kind {message_kind(piece)} and {total} bytes")
            if total <= len(piece):
                return piece[:total]
            self._message = torch.empty(total, dtype=torch.uint8)
            self._message[: len(piece)] = piece
            self._filled = len(piece)
            return None
        message, count = self._message, message_bytes(piece) - HEADER_BYTES
        if message_kind(piece) != Kind.CONTINUATION or not 0 < count <= len(message) - self._filled:
            raise ValueError(f"kind {message_kind(piece)} with {count} bytes amid a message")
        message[self._filled : self._filled + count] = piece[HEADER_BYTES : HEADER_BYTES + count]
        self._filled += count
        if self._filled < len(message):
            return None
        self._message = None
        return message

"""Messages cut into pieces come together again, and what makes no message is noticed."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.pieces import PIECE_BYTES, Assembly, pieces
from experts.wire import HEADER_BYTES, Kind, Message, WireFormat, write_header

WIRE = WireFormat(max_groups=3, max_rows=1200, hidden_size=512, dtype=torch.float32)


def rows(count: int) -> torch.Tensor:
    return torch.randn(count, WIRE.hidden_size, generator=torch.Generator().manual_seed(count))


def received(message: torch.Tensor, garbage: int = 0) -> Iterator[torch.Tensor]:
    """What is in the receive buffer after each piece: behind a short one, what was there before."""
    buffer = torch.full((PIECE_BYTES,), garbage, dtype=torch.uint8)
    for piece in pieces(message):
        assert len(piece) <= PIECE_BYTES
        buffer[: len(piece)] = piece
        yield buffer


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 255, 256, 257, 511, 512, 600, 1199, 1200]), min_size=1, max_size=4))
def test_messages_of_any_length_come_together(counts: list[int]) -> None:
    assembly, buffer = Assembly(WIRE.capacity), WIRE.new_buffer()
    for sequence, count in enumerate(counts):
        x_ND = rows(count) if count else None
        packed = WIRE.pack(Message(Kind.ROWS, sequence, 4, [7], [1], [max(count, 1)], x_ND), buffer)
        *before, whole = [assembly.add(piece) for piece in received(packed, garbage=sequence)]
        assert before == [None] * len(before)
        assert whole is not None
        message = WIRE.unpack(whole)
        assert (message.sequence, message.layer, list(message.experts)) == (sequence, 4, [7])
        assert message.x_ND is x_ND or torch.equal(message.x_ND, x_ND)


def header(kind: int, total: int) -> torch.Tensor:
    buffer = torch.zeros(PIECE_BYTES, dtype=torch.uint8)
    write_header(buffer, kind, total)  # type: ignore[arg-type]
    return buffer


BROKEN = {
    "a message longer than the link's": [header(Kind.RESULT, WIRE.capacity + 1)],
    "a message shorter than its header": [header(Kind.RESULT, HEADER_BYTES - 1)],
    "a negative length": [header(Kind.RESULT, -1)],
    "a piece of nothing": [header(Kind.CONTINUATION, PIECE_BYTES)],
    "another message amid one": [header(Kind.RESULT, 2 * PIECE_BYTES), header(Kind.HEARTBEAT, HEADER_BYTES)],
    "a piece that is too long": [
        header(Kind.RESULT, PIECE_BYTES + 10),
        header(Kind.CONTINUATION, HEADER_BYTES + 11),
    ],
    "a piece without bytes": [header(Kind.RESULT, 2 * PIECE_BYTES), header(Kind.CONTINUATION, HEADER_BYTES)],
}


@pytest.mark.parametrize("arriving", BROKEN.values(), ids=BROKEN)
def test_what_makes_no_message_is_noticed(arriving: list[torch.Tensor]) -> None:
    assembly = Assembly(WIRE.capacity)
    *first, last = arriving
    assert [assembly.add(piece) for piece in first] == [None] * len(first)
    with pytest.raises(ValueError, match="message"):
        assembly.add(last)

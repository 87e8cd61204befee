"""Messages survive the wire, and what does not fit is caught before it is sent."""

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.errors import RefusalCode
from experts.wire import MAX_TEXT_BYTES, Kind, Message, WireFormat

HIDDEN = 6
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIRE = WireFormat(max_groups=5, max_rows=9, hidden_size=HIDDEN, dtype=torch.float32)


def rows(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(count)).to(dtype)


def packed(wire: WireFormat, message: Message) -> bytes:
    return b"".join(wire.pack(message))


def sent(wire: WireFormat, message: Message) -> Message:
    """Pack, carry the bytes, read."""
    stream = io.BytesIO(packed(wire, message))
    received, rows = read(wire, stream)
    assert rows == (0 if message.x_ND is None else len(message.x_ND))
    assert stream.read() == b""
    return received


def read(wire: WireFormat, stream: io.BytesIO) -> tuple[Message, int]:
    def fill(memory: memoryview) -> None:
        assert stream.readinto(memory) == len(memory)

    return wire.read(fill)


def same(left: Message, right: Message) -> bool:
    def header(m: Message) -> tuple[object, ...]:
        return (m.kind, m.sequence, m.layer, *(list(of) for of in (m.experts, m.versions, m.counts)), m.text, m.code)

    if left.x_ND is None or right.x_ND is None:
        return header(left) == header(right) and left.x_ND is right.x_ND
    return header(left) == header(right) and torch.equal(left.x_ND, right.x_ND)


counts_of = st.lists(st.integers(1, 3), min_size=1, max_size=3)
numbers = st.integers(0, 2**63 - 1)
wires = st.builds(WireFormat, st.integers(3, 40), st.integers(9, 12), st.just(HIDDEN), st.sampled_from(DTYPES))


@given(wires, numbers, st.integers(0, 2**31 - 3), st.integers(0, 47), counts_of)
def test_rows_and_their_experts_survive(
    wire: WireFormat, sequence: int, version: int, layer: int, counts: list[int]
) -> None:
    experts = [2**31 - 1 - index for index in range(len(counts))]
    versions = [version + index for index in range(len(counts))]
    message = Message(Kind.ROWS, sequence, layer, experts, versions, counts, rows(sum(counts), wire.dtype))
    assert same(sent(wire, message), message)


@given(wires, numbers, st.integers(1, 9))
def test_a_result_survives(wire: WireFormat, sequence: int, count: int) -> None:
    message = Message(Kind.RESULT, sequence, x_ND=rows(count, wire.dtype))
    assert same(sent(wire, message), message)


@given(wires, numbers, st.text(max_size=20), st.sampled_from(RefusalCode))
def test_a_refusal_its_code_and_its_text_survive(wire: WireFormat, sequence: int, text: str, code: RefusalCode) -> None:
    message = Message(Kind.REFUSAL, sequence, text=text, code=code)
    assert same(sent(wire, message), message)


def test_a_heartbeat_is_a_header_and_nothing_else() -> None:
    assert len(packed(WIRE, Message(Kind.HEARTBEAT))) == 56
    assert same(sent(WIRE, Message(Kind.HEARTBEAT)), Message(Kind.HEARTBEAT))


def test_numbers_that_are_not_finite_survive() -> None:
    x_ND = torch.tensor([[float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, 3e38]])
    received = sent(WIRE, Message(Kind.RESULT, x_ND=x_ND)).x_ND
    assert received is not None
    assert torch.equal(received.view(torch.int32), x_ND.view(torch.int32))


def test_rows_that_are_not_contiguous_survive() -> None:
    x_ND = rows(8)[::2]
    assert same(sent(WIRE, Message(Kind.RESULT, x_ND=x_ND)), Message(Kind.RESULT, x_ND=x_ND))


def test_messages_that_were_read_do_not_share_memory() -> None:
    messages = [Message(Kind.RESULT, sequence, x_ND=rows(4) + sequence) for sequence in range(6)]
    stream = io.BytesIO(b"".join(packed(WIRE, message) for message in messages))
    received = [read(WIRE, stream)[0] for _ in messages]
    assert all(map(same, received, messages))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_what_a_message_has_is_sent(dtype: torch.dtype) -> None:
    wire = WireFormat(max_groups=128, max_rows=9, hidden_size=HIDDEN, dtype=dtype)
    message = Message(Kind.ROWS, experts=[1, 2], versions=[1, 1], counts=[1, 2], x_ND=rows(3, dtype))
    assert len(packed(wire, message)) == 56 + 2 * 12 + 3 * wire.row_bytes
    assert len(packed(replace(wire, rows_inline=False), message)) == 56 + 2 * 12


@pytest.mark.parametrize(
    ("numbers", "fault"),
    [
        ((2, 1, 0, 6, 0, 0, 0), "6 experts, on a link of 5"),
        ((2, 1, 0, -1, 0, 0, 0), "-1 experts"),
        ((3, 1, 0, 0, 10, 0, 0), "10 rows, on a link of 9"),
        ((3, 1, 0, 0, -1, 0, 0), "-1 rows"),
        ((4, 1, 0, 0, 0, 2**40, 1), "bytes of text"),
        ((9, 1, 0, 0, 0, 0, 0), "9 is not a valid Kind"),
        ((4, 1, 0, 0, 0, 0, 9), "9 is not a valid RefusalCode"),
    ],
)
def test_what_is_no_message_is_refused_before_it_takes_memory(numbers: tuple[int, ...], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        read(WIRE, io.BytesIO(torch.tensor(numbers).numpy().tobytes()))


@pytest.mark.parametrize("letter", ["x", "é", "€", "𝄞"])
def test_a_text_that_does_not_fit_is_cut_and_stays_readable(letter: str) -> None:
    space = MAX_TEXT_BYTES - 1  # odd, so that letters of several bytes are cut in their middle
    received = sent(WIRE, Message(Kind.REFUSAL, text="!" + letter * space)).text
    whole = "!" + letter * (space // len(letter.encode()))
    assert received.removesuffix("\N{REPLACEMENT CHARACTER}") == whole


def test_a_text_that_is_no_unicode_is_sent_as_well_as_it_can_be() -> None:
    """Errors may name files whose names are not UTF-8; a refusal that cannot be sent would end the shard's thread."""
    assert sent(WIRE, Message(Kind.REFUSAL, text="no file \udcff")).text == "no file ?"


def test_too_many_rows_are_a_defect_of_the_sender() -> None:
    with pytest.raises(AssertionError, match="10 rows for a link of 9"):
        WIRE.check(Message(Kind.RESULT, x_ND=rows(10)))


@pytest.mark.parametrize("x_ND", [torch.zeros(1, HIDDEN + 1), torch.zeros(1, HIDDEN).double()], ids=["width", "dtype"])
def test_rows_of_another_kind_are_a_defect_of_the_sender(x_ND: torch.Tensor) -> None:
    with pytest.raises(AssertionError, match="rows"):
        WIRE.check(Message(Kind.RESULT, x_ND=x_ND))


def test_too_many_experts_are_a_defect_of_the_sender() -> None:
    message = Message(Kind.ROWS, experts=range(6), versions=[1] * 6, counts=[1] * 6, x_ND=rows(6))
    with pytest.raises(AssertionError, match="6 experts for a link of 5"):
        WIRE.check(message)


@pytest.mark.parametrize("field", ["experts", "versions", "counts"])
@pytest.mark.parametrize("number", [-1, 2**31, 2**63])
def test_numbers_beyond_what_the_wire_carries_are_a_defect_of_the_sender(field: str, number: int) -> None:
    message = Message(Kind.ROWS, experts=[1], versions=[1], counts=[1], x_ND=rows(1))
    beyond: dict[str, Any] = {field: [number]}
    with pytest.raises(AssertionError, match=f"{field} from {number} to {number}; the wire carries int32"):
        WIRE.check(replace(message, **beyond))

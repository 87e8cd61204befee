"""Messages survive the wire, and what does not fit is caught before it is sent."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.errors import RefusalCode
from experts.wire import Kind, Message, WireFormat

HIDDEN = 6
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIRE = WireFormat(max_groups=5, max_rows=9, hidden_size=HIDDEN, dtype=torch.float32)


def rows(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(count)).to(dtype)


def sent(wire: WireFormat, message: Message, garbage: int = 0) -> Message:
    """Pack, carry the bytes into a receive buffer that holds `garbage`, unpack."""
    packed = wire.pack(message, wire.new_buffer())
    received = torch.full((wire.capacity,), garbage, dtype=torch.uint8)
    received[: len(packed)] = packed
    return wire.unpack(received)


def same(left: Message, right: Message) -> bool:
    def header(m: Message) -> tuple[object, ...]:
        return (m.kind, m.sequence, m.layer, *(list(of) for of in (m.experts, m.versions, m.counts)), m.text, m.code)

    if left.x_ND is None or right.x_ND is None:
        return header(left) == header(right) and left.x_ND is right.x_ND
    return header(left) == header(right) and torch.equal(left.x_ND, right.x_ND)


counts_of = st.lists(st.integers(1, 3), min_size=1, max_size=3)
numbers = st.integers(0, 2**63 - 1)
wires = st.builds(WireFormat, st.integers(3, 40), st.integers(9, 12), st.just(HIDDEN), st.sampled_from(DTYPES))


@given(wires, numbers, st.integers(0, 2**31 - 3), st.integers(0, 47), counts_of, st.integers(0, 255))
def test_rows_and_their_experts_survive(
    wire: WireFormat, sequence: int, version: int, layer: int, counts: list[int], garbage: int
) -> None:
    experts = [2**31 - 1 - index for index in range(len(counts))]
    versions = [version + index for index in range(len(counts))]
    message = Message(Kind.ROWS, sequence, layer, experts, versions, counts, rows(sum(counts), wire.dtype))
    assert same(sent(wire, message, garbage), message)


@given(wires, numbers, st.integers(1, 9))
def test_a_result_survives(wire: WireFormat, sequence: int, count: int) -> None:
    message = Message(Kind.RESULT, sequence, x_ND=rows(count, wire.dtype))
    assert same(sent(wire, message, garbage=255), message)


@given(wires, numbers, st.text(max_size=20), st.sampled_from(RefusalCode))
def test_a_refusal_its_code_and_its_text_survive(wire: WireFormat, sequence: int, text: str, code: RefusalCode) -> None:
    message = Message(Kind.REFUSAL, sequence, text=text, code=code)
    assert same(sent(wire, message, garbage=255), message)


def test_a_heartbeat_is_a_header_and_nothing_else() -> None:
    packed = WIRE.pack(Message(Kind.HEARTBEAT), WIRE.new_buffer())
    assert len(packed) == WIRE.rows_offset
    assert same(WIRE.unpack(packed), Message(Kind.HEARTBEAT))


def test_numbers_that_are_not_finite_survive() -> None:
    x_ND = torch.tensor([[float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, 3e38]])
    received = sent(WIRE, Message(Kind.RESULT, x_ND=x_ND)).x_ND
    assert received is not None
    assert torch.equal(received.view(torch.int32), x_ND.view(torch.int32))


def test_rows_that_are_not_contiguous_survive() -> None:
    x_ND = rows(8)[::2]
    assert same(sent(WIRE, Message(Kind.RESULT, x_ND=x_ND)), Message(Kind.RESULT, x_ND=x_ND))


def test_a_buffer_may_be_reused_once_a_message_is_read() -> None:
    buffer = WIRE.new_buffer()
    first = WIRE.unpack(WIRE.pack(Message(Kind.RESULT, 1, x_ND=rows(9)), buffer))
    second = WIRE.unpack(WIRE.pack(Message(Kind.REFUSAL, 2, text="no"), buffer))
    assert same(first, Message(Kind.RESULT, 1, x_ND=rows(9)))
    assert same(second, Message(Kind.REFUSAL, 2, text="no"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_groups", [1, 7, 8, 16, 128])
def test_capacity_is_what_the_largest_message_takes(max_groups: int, dtype: torch.dtype) -> None:
    wire = WireFormat(max_groups, max_rows=max_groups, hidden_size=HIDDEN, dtype=dtype)
    ones = [1] * max_groups
    largest = Message(Kind.ROWS, experts=range(max_groups), versions=ones, counts=ones, x_ND=rows(max_groups, dtype))
    assert len(wire.pack(largest, wire.new_buffer())) == wire.capacity
    assert wire.rows_offset % 64 == 0
    assert 64 + 12 * max_groups <= wire.rows_offset < 64 + 12 * max_groups + 64


def test_only_what_a_message_fills_is_sent() -> None:
    one_row = WIRE.pack(Message(Kind.RESULT, x_ND=rows(1)), WIRE.new_buffer())
    assert len(one_row) == WIRE.rows_offset + WIRE.row_bytes


@pytest.mark.parametrize("letter", ["x", "é", "€", "𝄞"])
def test_a_text_that_does_not_fit_is_cut_and_stays_readable(letter: str) -> None:
    space = WIRE.max_rows * WIRE.row_bytes - 1  # odd, so that letters of several bytes are cut in their middle
    received = sent(WIRE, Message(Kind.REFUSAL, text="!" + letter * space), garbage=255).text
    whole = "!" + letter * (space // len(letter.encode()))
    assert received.removesuffix("\N{REPLACEMENT CHARACTER}") == whole


def test_a_text_that_is_no_unicode_is_sent_as_well_as_it_can_be() -> None:
    """Errors may name files whose names are not UTF-8; a refusal that cannot be sent would end the shard's thread."""
    assert sent(WIRE, Message(Kind.REFUSAL, text="no file \udcff")).text == "no file ?"


def test_too_many_rows_are_a_defect_of_the_sender() -> None:
    with pytest.raises(AssertionError, match="10 rows for a link of 9"):
        WIRE.check(Message(Kind.RESULT, x_ND=rows(10)))


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

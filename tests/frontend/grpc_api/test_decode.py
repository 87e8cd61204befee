"""Bytes to requests: whatever passes the check, protobuf makes no more fields of it than are taken."""

from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from hypothesis import example, given, settings
from hypothesis import strategies as st

from frontend.grpc_api import decode
from frontend.grpc_api.decode import MalformedRequest, decoder
from protos.drover.v1 import inference_pb2 as pb

REQUESTS = [pb.ChatRequest, pb.GenerateRequest, pb.DetokenizeRequest]
FEW = 8  # fields that a request may have here


def varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])


def tag(number: int, wire_type: int) -> bytes:
    return varint(number << 3 | wire_type)


def field(number: int, content: bytes) -> bytes:
    return tag(number, 2) + varint(len(content)) + content


def group(number: int, content: bytes) -> bytes:
    return tag(number, 3) + content + tag(number, 4)


def fields_in(message: Message) -> int:
    """How many fields protobuf has made, those inside messages included; a list of numbers is one."""

    def in_each(value: Any) -> Iterator[int]:
        for each in value if isinstance(value, list) else [value]:
            yield 1 + (fields_in(each) if isinstance(each, Message) else 0)

    made = len(UnknownFieldSet(message))
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None and descriptor.message_type.GetOptions().map_entry:
            made += len(value)
        elif descriptor.is_repeated:
            made += sum(in_each(list(value))) if descriptor.type not in _NUMBERS else 1
        else:
            made += sum(in_each(value))
    return made


_NUMBERS = {descriptor.type for descriptor in pb.TokenIds.DESCRIPTOR.fields}

NUMBERS = st.sampled_from([1, 2, 3, 4, 5, 6, 12, 14, 1000, 2**29 - 1])
SCALARS = st.one_of(
    st.builds(lambda number, value: tag(number, 0) + varint(value), NUMBERS, st.integers(0, 2**64 - 1)),
    st.builds(lambda number, content: tag(number, 1) + content, NUMBERS, st.binary(min_size=8, max_size=8)),
    st.builds(lambda number, content: tag(number, 5) + content, NUMBERS, st.binary(min_size=4, max_size=4)),
    st.builds(field, NUMBERS, st.binary(max_size=12)),
    st.builds(tag, NUMBERS, st.integers(0, 7)),
    st.binary(max_size=4),
    st.sampled_from([b"\xff" * 11, b"\x8a\x80\x80\x80\x80\x00", field(2, b"") * (FEW + 1)]),
)
WIRE = st.recursive(
    SCALARS,
    lambda parts: st.builds(
        lambda make, number, inside: make(number, b"".join(inside)),
        st.sampled_from([field, field, group]),
        NUMBERS,
        st.lists(parts, max_size=4),
    ),
    max_leaves=12,
)
HIDING = field(2, b"\xff" * 11)  # as a message of Chat it cannot be read; in an unknown group it is any bytes
CROWD = field(2, b"") * (FEW + 1)


@pytest.fixture(scope="module", autouse=True)
def few_fields() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "MAX_FIELDS", FEW)
        yield


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(REQUESTS), st.lists(WIRE, max_size=12).map(b"".join))
@example(pb.ChatRequest, group(1000, HIDING) + CROWD)
@example(pb.ChatRequest, field(3, group(1000, HIDING)) + CROWD)
@example(pb.ChatRequest, group(2, HIDING) + CROWD)
def test_what_passes_becomes_no_more_fields_than_are_taken(request_class: type[Message], raw: bytes) -> None:
    message = decoder(request_class)(raw)
    if isinstance(message, MalformedRequest):
        assert message.field
        assert message.reason
    else:
        assert message == request_class.FromString(raw)
        assert fields_in(message) <= FEW


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_what_a_client_library_writes_is_taken_up_to_the_limit(data: st.DataObject) -> None:
    texts = data.draw(st.lists(st.text(max_size=5), max_size=5))
    request = pb.ChatRequest(messages=[pb.ChatMessage(content=text) for text in texts], timeout_s=0.5)
    fields = sum(1 + bool(text) for text in texts) + 1
    message = decoder(pb.ChatRequest)(request.SerializeToString())
    assert (message == request) if fields <= FEW else isinstance(message, MalformedRequest)


@pytest.mark.parametrize("numbers", [10, 11])
def test_numbers_in_packed_lists_are_bounded_apart_from_their_bytes(
    monkeypatch: pytest.MonkeyPatch, numbers: int
) -> None:
    monkeypatch.setattr(decode, "MAX_NUMBERS", 10)
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[2**20] * 7))
    request.sampling.stop_token_ids.extend([5] * (numbers - 7))
    message = decoder(pb.GenerateRequest)(request.SerializeToString())
    if numbers == 10:
        assert message == request
    else:
        reason = "has 4 entries; a request has at most 10 in all its lists"
        assert message == MalformedRequest("sampling.stop_token_ids", reason)


def test_every_packed_list_of_a_request_is_of_varints() -> None:
    lists = [field for message in pb.DESCRIPTOR.message_types_by_name.values() for field in message.fields]
    requested = [f for f in lists if f.is_packed and "Response" not in f.containing_type.name]
    assert requested
    assert {f.type for f in requested} == {f.TYPE_UINT32 for f in requested}


UNREADABLE = {
    "a group": (group(1000, b""), "drover.v1.ChatRequest", "holds a group (field 1000); protobuf's groups"),
    "a group inside": (field(3, group(7, b"")), "sampling", "holds a group (field 7); protobuf's groups"),
    "the end of a group": (tag(5, 4), "drover.v1.ChatRequest", "holds a group (field 5)"),
    "a number beyond its message": (field(2, b"\x80") + b"\x01", "messages", "is not a valid protobuf message"),
    "four bytes beyond it": (field(3, tag(2, 5)) + b"abcd", "sampling", "is not a valid protobuf message"),
    "wire type 7": (tag(9, 7), "drover.v1.ChatRequest", "is not a valid protobuf message"),
}


@pytest.mark.parametrize(("raw", "path", "reason"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_followed_is_refused_before_protobuf_reads_it(raw: bytes, path: str, reason: str) -> None:
    fault = decoder(pb.ChatRequest)(raw + CROWD[:4])
    assert isinstance(fault, MalformedRequest)
    assert fault.field == path
    assert fault.reason.startswith(reason)

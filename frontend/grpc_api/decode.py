"""Requests from bytes.

Bytes that are no valid request, hold too many fields, or hold a group become a value that says why,
not an exception.

An exception in a request deserializer reaches the client as INTERNAL "Exception deserializing
request!", which blames the server and hides the field. So a deserializer made here never raises;
`frontend/grpc_api/server.py` answers a MalformedRequest with INVALID_ARGUMENT.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

# Protobuf's wire types. Those of strings, bytes, messages and packed numbers are LENGTH_DELIMITED.
VARINT, FIXED64, LENGTH_DELIMITED, GROUP, GROUP_END, FIXED32 = range(6)

# In one request, those inside messages included; a packed list is one field. A conversation has
# three for each message. Protobuf makes 50 bytes and more of a field of two, and a loop over a
# million fields holds up every stream for a second.
MAX_FIELDS = 32_768
# In all packed lists of one request: more than the ten million tokens of the largest context.
# Protobuf makes four bytes of a number of one, and 64 million of them take it a second.
MAX_NUMBERS = 2**24
_CONTINUED = bytes(range(0x80, 0x100))  # all bytes of a varint but its last are of these


_NO_MESSAGE = "is not a valid protobuf message"


@dataclass(frozen=True)
class MalformedRequest:
    """Stands for a request that could not be read.

    field: path of the field at fault, as errors name it, or the message's type where no field can
    be named.
    """

    field: str
    reason: str


def decoder(request_class: type[Message]) -> Callable[[bytes], Message | MalformedRequest]:
    """A request deserializer for `request_class` that returns MalformedRequest instead of raising.

    It takes time in proportion to the bytes, whatever they are: fields are counted first.
    """

    def decode(raw: bytes) -> Message | MalformedRequest:
        fault = _fault_in_structure(raw, request_class.DESCRIPTOR)
        if fault is not None:
            return fault
        try:
            return request_class.FromString(raw)
        except DecodeError:
            return _fault_in(raw, request_class.DESCRIPTOR) or MalformedRequest(
                request_class.DESCRIPTOR.full_name, "the request is not a valid protobuf message of this type"
            )

    return decode


class _Unreadable(Exception):
    """Bytes that cannot be followed, or must not be.

    path: of the field or message at fault, "" for the request itself.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason


@dataclass(frozen=True)
class _Seen:
    """Fields, and numbers in packed lists, by path."""

    fields: Counter[str]
    numbers: Counter[str]


def _fault_in_structure(raw: bytes, descriptor: Any) -> MalformedRequest | None:
    """Why protobuf must not see these bytes: too many fields, or a field that cannot be followed.

    Reads up to MAX_FIELDS tags and skips what follows each. What it passes, it has walked to the
    end. So protobuf makes no more fields, and no longer lists, than were counted.
    """
    seen = _Seen(Counter(), Counter())
    try:
        left = _count(raw, 0, len(raw), descriptor, "", MAX_FIELDS, seen)
    except _Unreadable as fault:
        return MalformedRequest(fault.path or descriptor.full_name, fault.reason)
    if left >= 0:
        return None
    [(path, count)] = seen.fields.most_common(1)
    return MalformedRequest(
        path or descriptor.full_name,
        f"occurs {count} times among the first {MAX_FIELDS} fields; a request has at most {MAX_FIELDS} fields",
    )


def _count(raw: bytes, place: int, end: int, descriptor: Any, path: str, left: int, seen: _Seen) -> int:
    """Count the fields of the message in raw[place:end], and of those inside it.

    left: how many may still come. Returns what is left of it, below 0 as soon as there are more.
    Raises _Unreadable where the bytes are no message, and for a group: no field of drover.v1 is
    one, and what is inside an unknown one follows rules of its own.
    """
    while place < end and left >= 0:
        tag, place = _varint(raw, place, end, path)
        left -= 1
        field = descriptor.fields_by_number.get(tag >> 3)
        name = "" if field is None else _join(path, field)
        seen.fields[name] += 1
        wire_type = tag & 7
        if wire_type == VARINT:
            _, place = _varint(raw, place, end, path)
        elif wire_type == LENGTH_DELIMITED:
            length, place = _varint(raw, place, end, path)
            if length > end - place:
                raise _Unreadable(path, _NO_MESSAGE)
            if field is not None and field.type == FieldDescriptor.TYPE_MESSAGE:
                left = _count(raw, place, place + length, field.message_type, name, left, seen)
            elif field is not None and field.is_packed:
                _count_numbers(raw[place : place + length], name, seen.numbers)
            place += length
        elif wire_type in (FIXED32, FIXED64):
            place += 4 if wire_type == FIXED32 else 8
        elif wire_type in (GROUP, GROUP_END):
            raise _Unreadable(path, f"holds a group (field {tag >> 3}); protobuf's groups are not taken")
        else:
            raise _Unreadable(path, _NO_MESSAGE)
    if place > end:
        raise _Unreadable(path, _NO_MESSAGE)
    return left


def _count_numbers(packed: bytes, path: str, numbers: Counter[str]) -> None:
    """Count the varints of a packed list: no request has a list of another type."""
    numbers[path] += len(packed.translate(None, delete=_CONTINUED))
    if numbers.total() > MAX_NUMBERS:
        raise _Unreadable(path, f"has {numbers[path]} entries; a request has at most {MAX_NUMBERS} in all its lists")


def _varint(raw: bytes, place: int, end: int, path: str) -> tuple[int, int]:
    """The number at `place`, and the place behind it. Raises _Unreadable if it is cut or too long."""
    number = 0
    for shift in range(0, 70, 7):
        if place >= end:
            break
        byte = raw[place]
        place += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, place
    raise _Unreadable(path, _NO_MESSAGE)


def _fault_in(raw: bytes, descriptor: Any, path: str = "") -> MalformedRequest | None:
    """The first field of the message `raw` that cannot be read; None where every field looks right.

    descriptor: of the message's type. The message is read as an Empty: protobuf then keeps every
    field as unchecked bytes, and each can be looked at on its own.
    """
    try:
        fields = UnknownFieldSet(Empty.FromString(raw))
    except DecodeError:
        return MalformedRequest(path, _NO_MESSAGE) if path else None
    seen: dict[int, int] = {}
    for unknown in map(fields.__getitem__, range(len(fields))):
        field = descriptor.fields_by_number.get(unknown.field_number)
        if field is None or unknown.wire_type != LENGTH_DELIMITED:
            continue
        index = seen[field.number] = seen.get(field.number, -1) + 1
        name = _join(path, field) + (f"[{index}]" if field.is_repeated else "")
        if field.type == FieldDescriptor.TYPE_STRING:
            try:
                unknown.data.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = unknown.data[error.start]
                return MalformedRequest(name, f"is not valid UTF-8 (byte 0x{byte:02x} at offset {error.start})")
        elif field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type is not None:
            fault = _fault_in(unknown.data, field.message_type, name)
            if fault is not None:
                return fault
    return None


def _join(path: str, field: FieldDescriptor) -> str:
    """The name that Drover's errors give a field, oneof members behind their oneof."""
    oneof = field.containing_oneof
    name = f"{oneof.name}.{field.name}" if oneof is not None and not oneof.name.startswith("_") else field.name
    return f"{path}.{name}" if path else name

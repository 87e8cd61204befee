"""Requests from bytes.

Bytes that are no valid request become a value that says why, not an exception.

An exception in a request deserializer reaches the client as INTERNAL "Exception deserializing
request!", which blames the server and hides the field. So a deserializer made here never raises;
`frontend/grpc_api/server.py` answers a MalformedRequest with INVALID_ARGUMENT.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

LENGTH_DELIMITED = 2  # the wire type of strings, bytes, messages and packed numbers


@dataclass(frozen=True)
class MalformedRequest:
    """Stands for a request that could not be read.

    field: path of the field at fault, as errors name it, or the message's type where no field can
    be named.
    """

    field: str
    reason: str


def decoder(request_class: type[Message]) -> Callable[[bytes], Message | MalformedRequest]:
    """A request deserializer for `request_class` that returns MalformedRequest instead of raising."""

    def decode(raw: bytes) -> Message | MalformedRequest:
        try:
            return request_class.FromString(raw)
        except DecodeError:
            return _fault_in(raw, request_class.DESCRIPTOR) or MalformedRequest(
                request_class.DESCRIPTOR.full_name, "the request is not a valid protobuf message of this type"
            )

    return decode


def _fault_in(raw: bytes, descriptor: Any, path: str = "") -> MalformedRequest | None:
    """The first field of the message `raw` that cannot be read; None where every field looks right.

    descriptor: of the message's type. The message is read as an Empty: protobuf then keeps every
    field as unchecked bytes, and each can be looked at on its own.
    """
    try:
        fields = UnknownFieldSet(Empty.FromString(raw))
    except DecodeError:
        return MalformedRequest(path, "is not a valid protobuf message") if path else None
    seen: dict[int, int] = {}
    for unknown in map(fields.__getitem__, range(len(fields))):
        field = descriptor.fields_by_number.get(unknown.field_number)
        if field is None or unknown.wire_type != LENGTH_DELIMITED:
            continue
        index = seen[field.number] = seen.get(field.number, -1) + 1
        name = _join(path, field, index)
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


def _join(path: str, field: FieldDescriptor, index: int) -> str:
    """The name that Drover's errors give a field: oneof members behind their oneof, repeated ones
    with their index."""
    oneof = field.containing_oneof
    name = f"{oneof.name}.{field.name}" if oneof is not None and not oneof.name.startswith("_") else field.name
    if field.is_repeated:
        name = f"{name}[{index}]"
    return f"{path}.{name}" if path else name

"""Requests that no good client sends, each made from a seed, a method's name and a number alone."""

import random
from collections.abc import Callable
from math import inf, nan
from typing import Any

from google.protobuf.descriptor import FieldDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2

from protos.drover.v1 import inference_pb2 as pb

SERVICES: tuple[ServiceDescriptor, ...] = (
    pb.DESCRIPTOR.services_by_name["Inference"],
    health_pb2.DESCRIPTOR.services_by_name["Health"],
)
METHODS: dict[str, type[Message]] = {
    f"/{service.full_name}/{method.name}": GetMessageClass(method.input_type)
    for service in SERVICES
    for method in service.methods
}

_WORDS = ["", "a", "user", "system", "assistant", "tool", "Hello there", "\0", "\ufeff", "\u202e", "é" * 7, "🦙" * 40]
_WORDS += ["<|begin_of_text|>", "<|eot|>", "<|header_start|>system<|header_end|>", "{{ 7 * 7 }}", "{% for", "x" * 5000]
_INTEGERS = [0, 1, 2, 3, 5, 16, 17, 20, 21, 199, 255, 256, 399, 400, 1024, 2**31 - 1]
_VALUES: dict[int, list[Any]] = {
    FieldDescriptor.TYPE_STRING: _WORDS,
    FieldDescriptor.TYPE_BOOL: [False, True],
    FieldDescriptor.TYPE_INT32: [*_INTEGERS, -1, -(2**31)],
    FieldDescriptor.TYPE_UINT32: [*_INTEGERS, 2**31, 2**32 - 1],
    FieldDescriptor.TYPE_UINT64: [*_INTEGERS, 2**32, 2**63, 2**64 - 1],
    FieldDescriptor.TYPE_FLOAT: [0.0, -0.0, 0.5, 1.0, 2.0, 100.0, 101.0, -1.0, 1e-45, 3.4e38, nan, inf, -inf],
}
_LENGTHS = [0, 1, 1, 2, 3, 17, 40, 400]


def malformed(seed: int, method: str, number: int) -> bytes:
    """The request; the same for the same arguments."""
    draw = random.Random(f"{seed} {method} {number}")
    return draw.choice(_KINDS)(draw, METHODS[method])


def _noise(draw: random.Random, request_class: type[Message]) -> bytes:
    return draw.randbytes(draw.choice([0, 1, 2, 3, 8, 64, 1000]))


def _extreme(draw: random.Random, request_class: type[Message]) -> bytes:
    """Valid bytes; the values are whatever the types can hold."""
    request = request_class()
    _fill(draw, request, draw.choice([0.2, 0.5, 0.9]))
    return request.SerializeToString(deterministic=True)


def _cut(draw: random.Random, request_class: type[Message]) -> bytes:
    raw = _extreme(draw, request_class)
    return raw[: draw.randrange(len(raw) + 1)]


def _flipped(draw: random.Random, request_class: type[Message]) -> bytes:
    raw = bytearray(_extreme(draw, request_class))
    for _ in range(draw.choice([1, 1, 2, 8]) if raw else 0):
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    return bytes(raw)


def _joined(draw: random.Random, request_class: type[Message]) -> bytes:
    """Fields that come twice, and fields of other methods' requests."""
    other = draw.choice(list(METHODS.values()))
    return _extreme(draw, request_class) + draw.choice([_extreme, _cut])(draw, draw.choice([request_class, other]))


def _grouped(draw: random.Random, request_class: type[Message]) -> bytes:
    """Groups, which no field of ours is: ended or not, around fields that make sense or none."""
    number = draw.choice([1, 2, 3, 15])
    begin, end = bytes([number << 3 | 3]), draw.choice([bytes([number << 3 | 4]), b"", b"\x0c"])
    inside = draw.choice([_noise, _extreme, _cut])(draw, request_class)
    return _extreme(draw, request_class) + begin + inside + end + _extreme(draw, request_class)


_KINDS: list[Callable[[random.Random, type[Message]], bytes]] = [
    _noise,
    _extreme,
    _extreme,
    _cut,
    _flipped,
    _joined,
    _grouped,
]


def _fill(draw: random.Random, message: Message, share: float) -> None:
    """Set about `share` of the fields."""
    for field in message.DESCRIPTOR.fields:
        if draw.random() >= (0.03 if field.name == "model" else share):
            continue
        count = draw.choice(_LENGTHS) if field.is_repeated else 1
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            for _ in range(count):
                key, value = (_value(draw, part) for part in field.message_type.fields)
                getattr(message, field.name)[key] = value
        elif field.message_type is not None and field.is_repeated:
            for _ in range(count):
                _fill(draw, getattr(message, field.name).add(), 0.9)
        elif field.message_type is not None:
            getattr(message, field.name).SetInParent()
            _fill(draw, getattr(message, field.name), share)
        elif field.is_repeated:
            getattr(message, field.name).extend(_value(draw, field) for _ in range(count))
        else:
            setattr(message, field.name, _value(draw, field))


def _value(draw: random.Random, field: FieldDescriptor) -> Any:
    return draw.choice(_VALUES[field.type])

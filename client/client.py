"""A blocking client for a Drover server.

with Client("127.0.0.1:9000") as client:
    for delta in client.generate("Once upon a time", max_tokens=20):
        print(delta.text, end="", flush=True)
"""

from collections.abc import Callable, Mapping, Sequence
from threading import Event
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message as ProtoMessage
from grpc_health.v1 import health_pb2, health_pb2_grpc

from client.delta_stream import RESUME_S, DeltaStream
from client.errors import ClientError, InvalidRequest, error_of
from client.types import ModelInfo, Sampling, model_info_of
from protos.drover.v1 import inference_pb2 as pb
from protos.drover.v1 import inference_pb2_grpc

if TYPE_CHECKING:
    from typing_extensions import Unpack

DEFAULT_ADDRESS = "127.0.0.1:9000"
INFERENCE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
PING_S, PING_TIMEOUT_S = 10.0, 5.0  # while calls wait for messages
_LOOPBACK = ("127.", "localhost", "[::1]")


class Client:
    """A connection to one server, opened by the first call. Threads may share it.

    Every method takes `timeout_s` for the whole call; None waits for ever. Errors are ClientErrors
    (client/errors.py).

    `generate` and `chat` take `resume_s`: a stream that breaks is resumed by itself, and goes on within so many
    seconds each time. With 0 it ends with ServerUnavailable.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS) -> None:
        """address: "host:port"."""
        self.address = address
        options = [
            ("grpc.max_receive_message_length", -1),
            # A proxy from the environment (http_proxy) cannot reach this machine's loopback.
            ("grpc.enable_http_proxy", int(not address.startswith(_LOOPBACK))),
            # By default grpc looks for a server that went away after 1, 1.6, ... 120 s.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
            # A host that is lost, or cut off, closes no connection. Without pings a stream would wait
            # for ever. A server that computes a long prompt answers them.
            ("grpc.keepalive_time_ms", round(PING_S * 1e3)),
            ("grpc.keepalive_timeout_ms", round(PING_TIMEOUT_S * 1e3)),
            ("grpc.http2.ping_timeout_ms", round(PING_TIMEOUT_S * 1e3)),  # of those that measure bandwidth
            ("grpc.http2.max_pings_without_data", 0),
        ]
        self._reached = Event()  # the server has answered once
        self._channel = grpc.insecure_channel(address, options=options)
        self._inference: Any = inference_pb2_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection and cancel its calls."""
        self._channel.close()

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        model: str = "",
        timeout_s: float | None = None,
        resume_s: float = RESUME_S,
        **sampling: "Unpack[Sampling]",
    ) -> DeltaStream:
        """Continue a prompt: text, or token ids, which are used unchanged.

        With n above 1 the deltas of all answers arrive interleaved. `Delta.index` says which
        answer each belongs to.
        """
        request = pb.GenerateRequest(model=model, sampling=_sampling(sampling))
        if isinstance(prompt, str):
            _set(request, "text", prompt, "prompt.text")
        else:
            _extend(request.token_ids.ids, prompt, "prompt.token_ids")
            request.token_ids.SetInParent()
        return DeltaStream(self._inference.Generate, request, self.address, timeout_s, resume_s, self._reached)

    def chat(
        self,
        messages: Sequence[tuple[str, str]],
        *,
        model: str = "",
        timeout_s: float | None = None,
        resume_s: float = RESUME_S,
        **sampling: "Unpack[Sampling]",
    ) -> DeltaStream:
        """Answer a conversation of (role, content) messages, oldest first."""
        request = pb.ChatRequest(model=model, sampling=_sampling(sampling))
        for index, (role, content) in enumerate(messages):
            message = request.messages.add()
            _set(message, "role", role, f"messages[{index}].role")
            _set(message, "content", content, f"messages[{index}].content")
        return DeltaStream(self._inference.Chat, request, self.address, timeout_s, resume_s, self._reached)

    def tokenize(
        self, text: str, *, add_bos: bool = True, model: str = "", timeout_s: float | None = None
    ) -> list[int]:
        """The token ids of a text, exactly as `generate` encodes it."""
        request = pb.TokenizeRequest(model=model, add_bos=add_bos)
        _set(request, "text", text, "text")
        reply: pb.TokenizeResponse = self._call(self._inference.Tokenize, request, timeout_s)
        return list(reply.token_ids)

    def detokenize(self, token_ids: Sequence[int], *, model: str = "", timeout_s: float | None = None) -> str:
        """The text of token ids. Special tokens appear as their names."""
        request = pb.DetokenizeRequest(model=model)
        _extend(request.token_ids, token_ids, "token_ids")
        reply: pb.DetokenizeResponse = self._call(self._inference.Detokenize, request, timeout_s)
        return reply.text

    def model_info(self, *, model: str = "", timeout_s: float | None = None) -> ModelInfo:
        """The served model and its limits."""
        request = pb.GetModelInfoRequest(model=model)
        return model_info_of(self._call(self._inference.GetModelInfo, request, timeout_s))

    def health(self, service: str = INFERENCE, *, timeout_s: float | None = None) -> str:
        """The health of a service: "SERVING" or "NOT_SERVING".

        Service "" is the server as a whole.
        """
        request = health_pb2.HealthCheckRequest(service=service)
        reply: health_pb2.HealthCheckResponse = self._call(self._health.Check, request, timeout_s)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))

    def _call(self, method: Callable[..., Any], request: ProtoMessage, timeout_s: float | None) -> Any:
        try:
            reply = method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise error_of(error, self.address) from None
        self._reached.set()
        return reply


def _sampling(given: Sampling) -> pb.SamplingParams:
    """The given fields as a message. Raises TypeError for an unknown one, like any function call."""
    params = pb.SamplingParams()
    for name, value in given.items():
        if name not in Sampling.__annotations__:
            raise TypeError(f"unknown sampling parameter {name!r}; known are {', '.join(Sampling.__annotations__)}")
        if name == "stop_token_ids":
            _extend(params.stop_token_ids, given["stop_token_ids"], "sampling.stop_token_ids")
        elif name == "stop":
            _extend_texts(params.stop, given["stop"], "sampling.stop")
        elif name == "logit_bias":
            _update(params.logit_bias, given["logit_bias"], "sampling.logit_bias")
        elif value is not None:
            _set(params, name, value, f"sampling.{name}")
    return params


def _set(message: ProtoMessage, name: str, value: object, field: str) -> None:
    try:
        setattr(message, name, value)
    except (TypeError, ValueError) as error:  # wrong type, out of range, or lone surrogates
        raise _unsendable(field, value, _RANGES.get(message.DESCRIPTOR.fields_by_name[name].cpp_type), error) from None


def _extend(repeated: Any, values: Sequence[int], field: str) -> None:
    try:
        repeated.extend(values)
    except (TypeError, ValueError) as error:
        raise _unsendable(field, values, _RANGES[FieldDescriptor.CPPTYPE_UINT32], error) from None


def _extend_texts(repeated: Any, texts: Sequence[str], field: str) -> None:
    # A string is also a sequence of strings, but the caller does not mean its letters.
    try:
        if isinstance(texts, str):
            raise TypeError("it takes a list of texts")
        repeated.extend(texts)
    except (TypeError, ValueError) as error:
        raise _unsendable(field, texts, None, error) from None


def _update(fields: Any, values: Mapping[int, float], field: str) -> None:
    try:
        for key, value in values.items():
            fields[key] = value
    except (TypeError, ValueError, AttributeError) as error:
        raise _unsendable(field, values, None, error) from None


# The ranges of the wire's integer types. The server checks the valid range of each field.
_RANGES = {
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


def _unsendable(field: str, value: object, bounds: tuple[int, int] | None, error: Exception) -> ClientError:
    """The error for a value that the wire type cannot hold. bounds: the range of an integer field."""
    shown = repr(value)
    problem = f"it takes whole numbers from {bounds[0]} to {bounds[1]}" if bounds else str(error)
    return InvalidRequest(
        grpc.StatusCode.INVALID_ARGUMENT, f"{field}: is {shown[:80]}{'...' * (len(shown) > 80)}; {problem}"
    )

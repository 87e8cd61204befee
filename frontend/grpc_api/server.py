"""Puts the services on a gRPC server: one in this process, or Ray Serve's.

Both use the same registration, whose deserializers never raise, and the same `answer_unary` and
`answer_stream`, which turn errors into statuses. These two are called by the handlers of
`serve_in_process` here, and by the methods of a Serve deployment there.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from types import SimpleNamespace
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection

from checkpoint.errors import DroverError
from frontend.grpc_api.decode import MalformedRequest, decoder
from frontend.grpc_api.health import HealthService
from frontend.grpc_api.service import InferenceService
from frontend.grpc_api.status import metadata_of, status_of
from protos.drover.v1 import inference_pb2
from router.errors import InvalidArgument

# A token of text has 4 to 8 bytes in most languages, a token id on the wire at most 3.
REQUEST_BYTES_PER_TOKEN = 16
MIN_REQUEST_BYTES = 4 * 2**20  # gRPC's own default; a small context does not lower it
MAX_REQUEST_BYTES = 64 * 2**20  # a context of ten million tokens does not raise it further
# gRPC cancels calls at random once 1,000 wait to be taken up, and all beyond 3,000. Their clients
# would see CANCELLED. The router's queue refuses with a reason instead.
MAX_PENDING_CALLS = 2**20
MIN_PING_INTERVAL_MS = 500
OWN_PORT = ("grpc.so_reuseport", 0)
"""Otherwise a second server would silently share the port with the first."""
NO_COMPRESSION = 1 << 0  # the set of grpc_compression_algorithm that holds GRPC_COMPRESS_NONE alone

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"]
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]

Response = TypeVar("Response", bound=Message)


class CallFailed(Exception):
    """A call failed and its context has the status; the text is that status's message.

    Crosses processes.
    """


class StatusContext(Protocol):
    """The part of a call's context that grpc.aio.ServicerContext and Ray's RayServegRPCContext
    share."""

    def set_code(self, code: grpc.StatusCode, /) -> None: ...

    def set_details(self, details: str, /) -> None: ...

    def set_trailing_metadata(self, metadata: Any, /) -> None: ...


async def answer_unary(
    method: Callable[[Any], Awaitable[Response]],
    request: Message | MalformedRequest,
    context: StatusContext,
    empty_response: Response,
) -> Response:
    """What `method` answers; if it fails, the status is set on `context` and gRPC ignores the empty response.

    Cancellation passes through.
    """
    try:
        return await method(_well_formed(request))
    except Exception as error:
        _set_status(context, error)
        return empty_response


async def answer_stream(
    method: Callable[[Any], AsyncGenerator[Response, None]],
    request: Message | MalformedRequest,
    context: StatusContext,
) -> AsyncGenerator[Response, None]:
    """The responses of `method`; if it fails, the status is set on `context` and CallFailed raised.

    The exception is needed: in Ray Serve's Python proxy a stream's status travels only with
    messages and exceptions. A status that is set after the last message would be lost, and the
    client would see OK. Cancellation passes through. Closing this generator closes the method's.
    """
    try:
        async with aclosing(method(_well_formed(request))) as responses:
            async for response in responses:
                yield response
    except Exception as error:
        raise CallFailed(_set_status(context, error)) from None


def max_request_bytes(max_context_tokens: int) -> int:
    """How large a request may be, in bytes: any prompt that the context holds, and not much more."""
    return min(max(REQUEST_BYTES_PER_TOKEN * max_context_tokens, MIN_REQUEST_BYTES), MAX_REQUEST_BYTES)


def server_options(max_context_tokens: int) -> list[tuple[str, int]]:
    """gRPC's options for a server of this context; a larger request gets RESOURCE_EXHAUSTED.

    A compressed request gets UNIMPLEMENTED. gRPC compares only its packed size with the limit, and
    250 kB unpack to 250 MB.
    """
    return [
        ("grpc.max_receive_message_length", max_request_bytes(max_context_tokens)),
        ("grpc.max_send_message_length", -1),
        ("grpc.compression_enabled_algorithms_bitset", NO_COMPRESSION),
        # By default a client that pings more often than every 300 s, while its call waits in the queue,
        # is sent away. Drover's pings every 10 s.
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
        ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
    ]


def add_inference_services(servicer: Any, server: grpc.aio.Server) -> None:
    """Register drover.v1.Inference; like the generated `add_InferenceServicer_to_server`, but see `add_service`.

    For Ray Serve its import path is one of the `grpc_servicer_functions`.
    """
    add_service(INFERENCE, servicer, server)


def add_health_service(servicer: Any, server: grpc.aio.Server) -> None:
    """Register grpc.health.v1.Health, in the same way."""
    add_service(HEALTH, servicer, server)


@asynccontextmanager
async def serve_in_process(
    service: InferenceService,
    health: HealthService,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    grace_s: float = 1.0,
) -> AsyncIterator[str]:
    """Serve both services, and reflection, from this event loop; gives the address, "host:port".

    port 0 takes any free one. On leaving, running calls get `grace_s` to end before they are
    cancelled.
    Raises DroverError if the port is taken.
    """
    options = server_options((await service.limits()).max_context_tokens)
    options += [OWN_PORT]
    server = grpc.aio.server(options=options)
    add_inference_services(handlers_of(INFERENCE, service), server)
    add_health_service(handlers_of(HEALTH, health), server)
    names = (INFERENCE.full_name, HEALTH.full_name, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    address = open_port(server, host, port)
    await server.start()
    try:
        yield address
    finally:
        await server.stop(grace_s)


def open_port(server: grpc.aio.Server, host: str, port: int) -> str:
    """Let the server listen there, from its start on; returns the address. Raises DroverError."""
    bracketed = f"[{host}]" if ":" in host else host
    try:
        return f"{bracketed}:{server.add_insecure_port(f'{bracketed}:{port}')}"
    except RuntimeError as error:
        raise DroverError(
            f"cannot listen on {bracketed}:{port}; is the port taken, or the host not this machine's?"
        ) from error


def add_service(descriptor: ServiceDescriptor, servicer: Any, server: grpc.aio.Server) -> None:
    """Register the attributes of `servicer` that have the names of the service's methods.

    The deserializers never raise: a handler may get a MalformedRequest. `answer_unary` and
    `answer_stream` refuse it. Ray Serve passes a mock servicer. It replaces the behaviours and
    serializers, but keeps the deserializers.
    """
    rpc_handlers = {}
    for method in descriptor.methods:
        make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
        rpc_handlers[method.name] = make(
            getattr(servicer, method.name),
            request_deserializer=decoder(GetMessageClass(method.input_type)),
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(descriptor.full_name, rpc_handlers),))
    server.add_registered_method_handlers(descriptor.full_name, rpc_handlers)


def handlers_of(descriptor: ServiceDescriptor, service: object) -> SimpleNamespace:
    """The methods of `service` as grpc.aio calls them: with a context, and statuses instead of
    errors."""

    def unary(method: Callable[[Any], Awaitable[Message]], response_class: type[Message]) -> Any:
        async def handle(request: Message | MalformedRequest, context: Any) -> Message:
            return await answer_unary(method, request, context, response_class())

        return handle

    def stream(method: Callable[[Any], AsyncGenerator[Message, None]]) -> Any:
        # Writes by itself rather than yield: a cancelled call then unwinds at once, wherever it
        # waits.
        async def handle(request: Message | MalformedRequest, context: Any) -> None:
            try:
                async with aclosing(answer_stream(method, request, context)) as responses:
                    async for response in responses:
                        await context.write(response)
            except CallFailed:
                pass  # the context has the status

        return handle

    made = SimpleNamespace()
    for method in descriptor.methods:
        bound = getattr(service, method.name)
        handler = stream(bound) if method.server_streaming else unary(bound, GetMessageClass(method.output_type))
        setattr(made, method.name, handler)
    return made


def _well_formed(request: Message | MalformedRequest) -> Message:
    if isinstance(request, MalformedRequest):
        raise InvalidArgument(request.field, request.reason)
    return request


def _set_status(context: StatusContext, error: Exception) -> str:
    code, details = status_of(error)
    context.set_code(code)
    context.set_details(details)
    metadata = metadata_of(error)
    if metadata:
        context.set_trailing_metadata(list(metadata))
    return details

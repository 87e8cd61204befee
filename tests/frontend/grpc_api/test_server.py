"""Registration, malformed bytes, health and reflection: on this process's own server and on Ray Serve's."""

import pickle
import warnings
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import Mock

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from checkpoint.errors import DroverError
from frontend.generation import Generation
from frontend.grpc_api.health import HealthService
from frontend.grpc_api.server import add_health_service, add_inference_services, answer_stream, answer_unary
from frontend.grpc_api.service import InferenceService
from protos.drover.v1 import inference_pb2 as pb
from protos.drover.v1 import inference_pb2_grpc
from tests.fake_router import FakeRouter, byte_tokenizer
from tests.loopback import CARD, event_loop_thread, failure_of, serving
from tests.processes import PATIENCE_S

INFERENCE = "drover.v1.Inference"
Status = health_pb2.HealthCheckResponse


@contextmanager
def serving_with_ray_serve(router: FakeRouter) -> Iterator[str]:
    """The services on the server class that Ray Serve's proxies and replicas run, without a cluster.

    Ray replaces each registered behaviour with its own, which calls the deployment's method of the same name with
    Ray's own context, then serializes what that returns. The status of a stream comes with its messages and exceptions
    only, as in Ray's Python proxy.
    """
    with warnings.catch_warnings():  # Ray's own deprecations, while it is imported
        warnings.simplefilter("ignore", DeprecationWarning)
        from ray.serve._private.grpc_util import (
            get_grpc_response_status,
            gRPCGenericServer,
            set_grpc_code_and_details,
        )
        from ray.serve._private.proxy_request_response import gRPCStreamingType
        from ray.serve.exceptions import gRPCStatusError
        from ray.serve.grpc_util import RayServegRPCContext

    service = InferenceService(Generation(CARD, byte_tokenizer(), None, router))
    health = HealthService(router, poll_interval_s=0.01)

    def behaviour_of(service_method: str, streaming_type: gRPCStreamingType) -> Callable[..., Any]:
        name = service_method.rpartition("/")[2]
        method = getattr(health, name, None) or getattr(service, name)

        async def unary(request: Any, context: Any) -> bytes:
            ray_context = RayServegRPCContext(context)
            response = await answer_unary(method, request, ray_context, pb.TokenizeResponse())
            ray_context._set_on_grpc_context(context)
            return response.SerializeToString()

        async def stream(request: Any, context: Any) -> AsyncGenerator[bytes, None]:
            ray_context = RayServegRPCContext(context)
            try:
                async for response in answer_stream(method, request, ray_context):
                    ray_context._set_on_grpc_context(context)
                    yield response.SerializeToString()
            except Exception as error:
                error = gRPCStatusError(pickle.loads(pickle.dumps(error)), ray_context.code(), ray_context.details())
                set_grpc_code_and_details(context, get_grpc_response_status(error, None, "request"))

        return unary if streaming_type is gRPCStreamingType.UNARY_UNARY else stream

    async def start() -> tuple[Any, int]:
        server = gRPCGenericServer(behaviour_of)
        add_inference_services(Mock(), server)
        add_health_service(Mock(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    with event_loop_thread() as run:
        server, port = run(start())
        try:
            yield f"127.0.0.1:{port}"
        finally:
            run(server.stop(0))


@pytest.fixture(scope="module")
def router() -> FakeRouter:
    return FakeRouter()


@pytest.fixture(scope="module", params=[serving, serving_with_ray_serve], ids=["in process", "Ray Serve"])
def channel(router: FakeRouter, request: pytest.FixtureRequest) -> Iterator[grpc.Channel]:
    with request.param(router) as address, grpc.insecure_channel(address) as channel:
        yield channel


@pytest.fixture
def health(router: FakeRouter, channel: grpc.Channel) -> health_pb2_grpc.HealthStub:
    router.ready = True
    return health_pb2_grpc.HealthStub(channel)


def call_with_bytes(channel: grpc.Channel, method: str, raw: bytes) -> grpc.RpcError:
    """Call `method` with bytes that no client library would send; returns the error."""
    make = channel.unary_stream if method in ("Generate", "Chat") else channel.unary_unary
    return failure_of(lambda: list(make(f"/{INFERENCE}/{method}")(raw, timeout=PATIENCE_S)))


def field(number: int, content: bytes) -> bytes:
    """A length-delimited protobuf field, at most 127 bytes long."""
    return bytes([number << 3 | 2, len(content)]) + content


LATIN_1 = "Grüße".encode("latin-1")
MALFORMED = {
    "Generate text": ("Generate", field(2, LATIN_1), "prompt.text: is not valid UTF-8 (byte 0xfc at offset 2)"),
    "Generate model": ("Generate", field(1, LATIN_1), "model: is not valid UTF-8 (byte 0xfc at offset 2)"),
    "Chat content": (
        "Chat",
        field(2, field(1, b"user") + field(2, b"Hi")) + field(2, field(1, b"user") + field(2, LATIN_1)),
        "messages[1].content: is not valid UTF-8 (byte 0xfc at offset 2)",
    ),
    "Tokenize text": ("Tokenize", field(2, LATIN_1), "text: is not valid UTF-8 (byte 0xfc at offset 2)"),
    "cut off": ("Generate", field(2, b"Hello")[:-2], "drover.v1.GenerateRequest: "),
    "a message inside cut off": ("Generate", field(4, b"\x08"), "sampling: "),
    "noise": ("GetModelInfo", b"\xff\xff\xff", "drover.v1.GetModelInfoRequest: "),
}


@pytest.mark.parametrize(("method", "raw", "details"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_bytes_are_the_clients_fault(channel, method: str, raw: bytes, details: str) -> None:
    error = call_with_bytes(channel, method, raw)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details().startswith(details)


def test_both_servers_answer_well_formed_requests(channel) -> None:
    stub = inference_pb2_grpc.InferenceStub(channel)
    responses = list(stub.Generate(pb.GenerateRequest(text="Hi"), timeout=PATIENCE_S))
    assert "".join(response.text for response in responses) == "Hello!"
    assert stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=PATIENCE_S).model == "tiny"


def test_errors_keep_their_status_and_message(channel) -> None:
    stub = inference_pb2_grpc.InferenceStub(channel)
    error = failure_of(lambda: list(stub.Generate(pb.GenerateRequest(), timeout=PATIENCE_S)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "prompt: is not set; give text or token_ids"
    error = failure_of(lambda: stub.GetModelInfo(pb.GetModelInfoRequest(model="other"), timeout=PATIENCE_S))
    assert error.code() is grpc.StatusCode.NOT_FOUND


def check(health, service: str) -> int:
    return health.Check(health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE_S).status


def test_check_tells_a_live_server_from_a_ready_model(router, health) -> None:
    assert (check(health, ""), check(health, INFERENCE)) == (Status.SERVING, Status.SERVING)
    router.ready = False
    assert (check(health, ""), check(health, INFERENCE)) == (Status.SERVING, Status.NOT_SERVING)


def test_check_of_an_unknown_service_is_not_found(health) -> None:
    error = failure_of(lambda: check(health, "drover.v1.Inferense"))
    assert error.code() is grpc.StatusCode.NOT_FOUND


def test_watch_tells_the_status_and_each_change(router, health) -> None:
    statuses = health.Watch(health_pb2.HealthCheckRequest(service=INFERENCE), timeout=PATIENCE_S)
    assert next(statuses).status == Status.SERVING
    router.ready = False
    assert next(statuses).status == Status.NOT_SERVING
    router.ready = True
    assert next(statuses).status == Status.SERVING
    statuses.cancel()


def test_watch_of_an_unknown_service_says_so_and_goes_on(health) -> None:
    statuses = health.Watch(health_pb2.HealthCheckRequest(service="nonsense"), timeout=0.5)
    assert next(statuses).status == Status.SERVICE_UNKNOWN
    error = failure_of(lambda: next(statuses))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_list_gives_every_service(health) -> None:
    statuses = health.List(health_pb2.HealthListRequest(), timeout=PATIENCE_S).statuses
    assert {name: reply.status for name, reply in statuses.items()} == {"": Status.SERVING, INFERENCE: Status.SERVING}


def test_reflection_lists_the_services(router) -> None:
    with serving(router) as address, grpc.insecure_channel(address) as channel:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        [response] = stub.ServerReflectionInfo(iter([request]), timeout=PATIENCE_S)
    names = {service.name for service in response.list_services_response.service}
    assert names == {INFERENCE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


def test_a_taken_port_is_refused(router) -> None:
    with (
        serving(router) as address,
        pytest.raises(DroverError, match="cannot listen on"),
        serving(router, port=int(address.rpartition(":")[2])),
    ):
        pass

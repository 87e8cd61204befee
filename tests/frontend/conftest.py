"""A scripted server on a real socket for the service's tests."""

from collections.abc import Iterator

import grpc
import pytest

from protos.drover.v1 import inference_pb2_grpc
from tests.fake_router import FakeRouter, says
from tests.loopback import serving


@pytest.fixture(scope="module")
def router() -> FakeRouter:
    return FakeRouter()


@pytest.fixture(scope="module")
def channel(router: FakeRouter) -> Iterator[grpc.Channel]:
    with serving(router) as address, grpc.insecure_channel(address) as channel:
        yield channel


@pytest.fixture
def stub(router: FakeRouter, channel: grpc.Channel) -> inference_pb2_grpc.InferenceStub:
    router.script = says("Hello!")
    router.requests.clear()
    router.closed.clear()
    router.endings.clear()
    return inference_pb2_grpc.InferenceStub(channel)

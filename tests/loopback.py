"""A real gRPC server on this machine's loopback, in a thread with its own event loop."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from frontend.generation import Generation
from frontend.grpc_api.health import HealthService
from frontend.grpc_api.server import serve_in_process
from frontend.grpc_api.service import InferenceService
from frontend.model_card import ModelCard
from tests.fake_router import EOS, LINE_TEMPLATE, FakeRouter, byte_tokenizer
from tests.processes import PATIENCE_S

CARD = ModelCard(
    name="tiny",
    eos_token_ids=(EOS,),
    num_layers=4,
    num_moe_layers=2,
    num_experts=16,
    experts_per_token=1,
    total_parameters=1_000_000,
    active_parameters=100_000,
    dtype="float32",
)


def failure_of(call: Callable[[], Any]) -> grpc.RpcError:
    """The error with which an RPC, or the iteration of its responses, must fail."""
    with pytest.raises(grpc.RpcError) as error:
        call()
    return error.value


@contextmanager
def event_loop_thread() -> Iterator[Any]:
    """An event loop running in a thread; gives `run(coroutine)`, which waits for the result."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(coroutine, loop)
        return future.result(PATIENCE_S)

    try:
        yield run
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE_S)
        loop.close()


@contextmanager
def serving(router: FakeRouter, *, with_chat_template: bool = True, port: int = 0) -> Iterator[str]:
    """Serve `router` with a byte tokenizer; gives the address."""
    template = LINE_TEMPLATE if with_chat_template else None
    service = InferenceService(Generation(CARD, byte_tokenizer(), template, router))
    health = HealthService(router, poll_interval_s=0.01)
    with event_loop_thread() as run:
        server = serve_in_process(service, health, port=port, grace_s=0)
        address = run(server.__aenter__())
        try:
            yield address
        finally:
            run(server.__aexit__(None, None, None))

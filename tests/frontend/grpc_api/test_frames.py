"""How many of our frames a token passes on its way out, from the router's stream to the wire. Each costs time."""

import asyncio
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from frontend.generation import Generation
from frontend.grpc_api.server import INFERENCE, handlers_of
from frontend.grpc_api.service import InferenceService
from protos.drover.v1 import inference_pb2 as pb
from tests.fake_router import FakeRouter, byte_tokenizer, says_then_waits
from tests.loopback import CARD
from tests.processes import PATIENCE_S

ROOT = Path(__file__).parents[3]
MAX_FRAMES = 5


def is_ours(filename: str) -> bool:
    return Path(filename).is_relative_to(ROOT) and not Path(filename).is_relative_to(ROOT / "tests")


class Context:
    """A call's context that takes responses."""

    def __init__(self) -> None:
        self.written = asyncio.Event()

    async def write(self, response: pb.GenerateResponse) -> None:
        self.written.set()


def in_process(service: InferenceService, request: pb.GenerateRequest, context: Context) -> Awaitable[None]:
    handler: Callable[..., Awaitable[None]] = handlers_of(INFERENCE, service).Generate
    return handler(request, context)


async def with_ray_serve(service: InferenceService, request: pb.GenerateRequest, context: Context) -> None:
    """Read the deployment's method, as Ray's replica does."""
    from cluster.serve_app import Frontend

    frontend: Any = SimpleNamespace(_inference=service)
    responses: AsyncGenerator[pb.GenerateResponse, None] = Frontend.Generate(frontend, request, context)
    async for response in responses:
        await context.write(response)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("serve", [in_process, with_ray_serve])
def test_a_token_passes_few_frames(serve: Callable[..., Awaitable[None]], n: int) -> None:
    service = InferenceService(Generation(CARD, byte_tokenizer(), None, FakeRouter(says_then_waits("Hel"))))
    request = pb.GenerateRequest(text="Hi", sampling=pb.SamplingParams(n=n))

    async def frames() -> list[str]:
        """Our functions between the call's task and the place where it waits for the next token."""

        async def call() -> None:
            await serve(service, request, context)

        context = Context()
        calling = asyncio.create_task(call())
        await asyncio.wait_for(context.written.wait(), PATIENCE_S)
        await asyncio.sleep(0)
        calling.cancel()
        try:
            await calling
        except asyncio.CancelledError as cancelled:
            codes = [frame.f_code for frame, _ in traceback.walk_tb(cancelled.__traceback__)]
            return [(Path(code.co_filename).stem, code.co_name) for code in codes if is_ours(code.co_filename)]
        raise AssertionError("it ended by itself")

    passed = asyncio.run(frames())
    assert passed[-1] == ("delta_stream", "__anext__")
    assert len(passed) <= MAX_FRAMES, passed

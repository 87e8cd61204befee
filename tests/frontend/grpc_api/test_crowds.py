"""Many streams at once, and streams that nobody reads."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import grpc

from protos.drover.v1 import inference_pb2 as pb
from protos.drover.v1 import inference_pb2_grpc
from router.request import FinishReason, GenerationRequest, TokenDelta, TokenLogprobs
from tests.fake_router import FakeRouter, says
from tests.loopback import serving
from tests.processes import PATIENCE_S

MIB = 2**20
FLOOD = [7]  # the prompt of those who get much


def channels_to(address: str, count: int) -> list[grpc.aio.Channel]:
    """Connections of their own."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    return [grpc.aio.insecure_channel(address, options=options) for _ in range(count)]


def test_of_thousands_of_streams_opened_at_once_none_is_cancelled() -> None:
    """gRPC's own default drops some beyond 1,000, and all beyond 3,000, that wait to be taken up."""
    streams, connections = 4000, 40
    statuses: Counter[str] = Counter()

    async def read_one(stub: Any) -> None:
        try:
            async for _ in stub.Generate(pb.GenerateRequest(text="Hi"), timeout=PATIENCE_S):
                pass
            statuses["OK"] += 1
        except grpc.aio.AioRpcError as error:
            statuses[error.code().name] += 1

    async def main(address: str) -> None:
        channels = channels_to(address, connections)
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        stubs = [inference_pb2_grpc.InferenceStub(channel) for channel in channels]
        await asyncio.gather(*(read_one(stubs[index % connections]) for index in range(streams)))
        for channel in channels:
            await channel.close()

    with serving(FakeRouter(says("", tokens_per_delta=8))) as address:
        asyncio.run(main(address))
    assert statuses == {"OK": streams}


async def floods(request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
    """1,000 tokens with 20 alternatives each: about 3 MB of Python objects."""
    if list(request.prompt_token_ids) != FLOOD:
        async for delta in says("Hello!")(request):
            yield delta
        return
    for index in range(1000):
        top = tuple((1000 * index + alternative, -0.5 - alternative) for alternative in range(20))
        last = FinishReason.LENGTH if index == 999 else None
        yield TokenDelta(request.request_id, (65,), (TokenLogprobs(65, -0.25, top),), last, first=index)
        await asyncio.sleep(0)


def resident_bytes() -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


def test_clients_that_never_read_hurt_nobody_and_memory_stays_bounded() -> None:
    """12 clients with 16 answers each would hold 600 MB."""
    router = FakeRouter(floods, max_unread_bytes=16 * MIB)
    greedy = pb.SamplingParams(n=16, logprobs=20)
    flood = pb.GenerateRequest(token_ids=pb.TokenIds(ids=FLOOD), sampling=greedy)

    async def status_of(call: Any) -> str:
        try:
            while await call.read() is not grpc.aio.EOF:
                pass
        except grpc.aio.AioRpcError:
            pass
        return f"{(await call.code()).name} {await call.details()}"[:46]

    async def main(address: str) -> None:
        before_bytes = resident_bytes()
        channels = channels_to(address, 13)
        stubs = [inference_pb2_grpc.InferenceStub(channel) for channel in channels]
        unread = [stub.Generate(flood, timeout=PATIENCE_S) for stub in stubs[:12]]
        for call in unread:
            await call.read()
        while not router.endings:  # until one of them has been ended
            good = [response async for response in stubs[12].Generate(pb.GenerateRequest(text="Hi"))]
            assert "".join(response.text for response in good) == "Hello!"
            assert router.unread_bytes <= 16 * MIB
        assert resident_bytes() - before_bytes < 150 * MIB
        statuses = set(await asyncio.gather(*map(status_of, unread)))
        assert statuses - {"OK "} == {"RESOURCE_EXHAUSTED the client does not read it"}
        for channel in channels:
            await channel.close()

    with serving(router) as address:
        asyncio.run(asyncio.wait_for(main(address), PATIENCE_S))

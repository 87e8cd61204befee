"""The load generator: sends every request of a job to a Drover server over gRPC and notes when its tokens come.

It shares the processor with what it measures, so it does little: messages are taken as bytes and parsed after the
job; its share of the processor is reported with every job.

    python -m bench.load ADDRESS
"""

import asyncio
import sys
import time
from collections.abc import Sequence
from typing import Any

import grpc

from bench.worker import Request, Stream, serve_jobs
from protos.drover.v1 import inference_pb2 as pb

GENERATE = f"/{pb.DESCRIPTOR.services_by_name['Inference'].full_name}/Generate"
# Streams are spread over them; one connection alone is one TCP stream with one flow-control window.
NUM_CHANNELS = 2


def message(request: Request) -> bytes:
    """A request as it goes over the wire."""
    sampling = pb.SamplingParams(max_tokens=request.max_tokens, temperature=0.0, ignore_eos=True)
    generate = pb.GenerateRequest(token_ids=pb.TokenIds(ids=request.token_ids), sampling=sampling)
    serialized: bytes = generate.SerializeToString()
    return serialized


async def run(address: str, requests: Sequence[Request]) -> list[Stream]:
    """One job, over connections that are open before it begins."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(NUM_CHANNELS)]
    try:
        for channel in channels:
            await channel.channel_ready()
        calls: list[Any] = [channel.unary_stream(GENERATE) for channel in channels]
        messages = [message(request) for request in requests]
        began_s = time.perf_counter()
        received = await asyncio.gather(
            *(
                _stream(calls[number % NUM_CHANNELS], messages[number], request.at_s, began_s)
                for number, request in enumerate(requests)
            )
        )
    finally:
        for channel in channels:
            await channel.close()
    return [_parse(pieces, error) for pieces, error in received]


async def _stream(
    generate: Any, request: bytes, at_s: float, began_s: float
) -> tuple[list[tuple[float, bytes]], str | None]:
    """(when, message) of everything that came, and the status that ended it if it is not OK."""
    pieces: list[tuple[float, bytes]] = []
    if at_s:
        await asyncio.sleep(began_s + at_s - time.perf_counter())
    try:
        async for piece in generate(request):
            pieces.append((time.perf_counter() - began_s, piece))
    except grpc.aio.AioRpcError as error:
        return pieces, f"{error.code().name}: {error.details()}"
    return pieces, None


def _parse(pieces: Sequence[tuple[float, bytes]], error: str | None) -> Stream:
    stream = Stream(error=error)
    for now_s, piece in pieces:
        stream.add(pb.GenerateResponse.FromString(piece).token_ids, now_s)
    return stream


def main() -> None:
    address = sys.argv[1]
    serve_jobs(lambda: lambda requests: (asyncio.run(run(address, requests)), {}))


if __name__ == "__main__":
    main()

"""A very long prompt beside running chats: how much slower their tokens come until its first token is there."""

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc

from bench.checkpoint import ensure_checkpoint
from bench.drover_server import ClusterShape, serving
from bench.errors import BenchError
from bench.measure import percentile
from bench.workload import prompts
from checkpoint.shape import ModelShape
from protos.drover.v1 import inference_pb2 as pb
from protos.drover.v1.inference_pb2_grpc import InferenceStub

CHATS, CHAT_PROMPT_TOKENS, CHAT_TOKENS = 8, 128, 400
LONG_PROMPT_TOKENS = 100_000
ALONE_S = 15.0
LONG_TIMEOUT_S = 900.0
# Small, so that 100,000 tokens are over in minutes on a CPU; attention chunks as long as Llama 4's own.
SMALL_SHAPE = ModelShape(
    vocab_size=4096,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=128,
    intermediate_size_mlp=256,
    max_position_embeddings=131072,
)


def long_prompt_effect(shape: ClusterShape, work: Path) -> dict[str, Any]:
    """Inter-token latency of CHATS chats, alone and beside a prompt of LONG_PROMPT_TOKENS tokens. Raises BenchError.

    Chats follow each other without a pause; times to first token are not counted.
    """
    checkpoint = work / "long-prompt-model"
    ensure_checkpoint(checkpoint, SMALL_SHAPE)
    with serving(checkpoint, shape, CHATS + 1, work) as address:
        try:
            return asyncio.run(_measure(address))
        except grpc.RpcError as error:
            raise BenchError(f"a request failed: {error.details()}") from None


async def _measure(address: str) -> dict[str, Any]:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = InferenceStub(channel)  # type: ignore[no-untyped-call]
        await _chat_until(stub, asyncio.sleep(1.0))  # warm
        alone_s, _ = await _chat_until(stub, asyncio.sleep(ALONE_S))
        beside_s, long_s = await _chat_until(stub, _first_token_s(stub))
    alone_ms, beside_ms = ([1e3 * gap for gap in gaps] for gaps in (alone_s, beside_s))
    return {
        "chats": CHATS,
        "prompt_tokens": LONG_PROMPT_TOKENS,
        "long_ttft_s": long_s,
        "alone_itl_ms_p50": percentile(alone_ms, 50),
        "alone_itl_ms_p99": percentile(alone_ms, 99),
        "beside_itl_ms_p50": percentile(beside_ms, 50),
        "beside_itl_ms_p99": percentile(beside_ms, 99),
        "p99_ratio": percentile(beside_ms, 99) / percentile(alone_ms, 99),
    }


async def _chat_until(stub: Any, event: Any) -> tuple[list[float], Any]:
    """The chats' inter-token latencies, seconds, until the awaitable `event` has a result, and that result."""
    gaps: list[float] = []

    async def chat(number: int) -> None:
        for [prompt] in (prompts(f"chat {number} {turn}", 1, [CHAT_PROMPT_TOKENS], 4096) for turn in range(10**6)):
            before_s = None
            async for _ in stub.Generate(_request(prompt, CHAT_TOKENS)):
                now_s = time.perf_counter()
                if before_s is not None:
                    gaps.append(now_s - before_s)
                before_s = now_s

    chats = [asyncio.create_task(chat(number)) for number in range(CHATS)]
    try:
        result = await event
    finally:
        for task in chats:
            task.cancel()
        ended = await asyncio.gather(*chats, return_exceptions=True)
    for error in ended:
        if isinstance(error, Exception):
            raise error
    return gaps, result


async def _first_token_s(stub: Any) -> float:
    await asyncio.sleep(1.0)  # the chats run by then
    [prompt] = prompts("long", 1, [LONG_PROMPT_TOKENS], 4096)
    began_s = time.perf_counter()
    async for _ in stub.Generate(_request(prompt, 1), timeout=LONG_TIMEOUT_S):
        pass
    return time.perf_counter() - began_s


def _request(prompt: list[int], max_tokens: int) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling)

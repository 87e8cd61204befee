"""Malformed requests against a server, beside good streams whose tokens must all be right."""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from protos.drover.v1 import inference_pb2 as pb
from protos.drover.v1 import inference_pb2_grpc
from tests.fuzz.malformed import METHODS, malformed

# With any other, the server would say that it is at fault itself, or say nothing.
REFUSALS = {"INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
AT_ONCE = 8  # malformed requests
GOOD_STREAMS = 2
# Of an answer; then the client cancels. A Watch has a second one only when something changes.
MESSAGES_READ, WATCHED = 3, 1
PATIENCE_S = 60.0
WARM_UP = 0.2  # share of the requests, before memory is looked at
MAX_GROWTH_BYTES = 64 * 2**20

GOOD = pb.GenerateRequest(
    token_ids=pb.TokenIds(ids=[5, 9, 42, 7]), sampling=pb.SamplingParams(max_tokens=32, temperature=0, ignore_eos=True)
)


@dataclass
class Report:
    """faults: what must not happen, with the request: (method, what happened, its bytes).

    statuses: of malformed requests, "read" where an answer came and was read in part.
    resident_bytes: of the server, after warm-up and at the end.
    """

    good_streams: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[str, str, bytes]] = field(default_factory=list)
    resident_bytes: tuple[int, int] | None = None

    @property
    def memory_is_flat(self) -> bool:
        return self.resident_bytes is None or self.resident_bytes[1] - self.resident_bytes[0] < MAX_GROWTH_BYTES


async def status_of(channel: grpc.aio.Channel, method: str, raw: bytes) -> str:
    """What a request is answered with."""
    call: Any = channel.unary_stream(method)(raw)  # a unary answer is a stream of one
    try:
        for _ in range(WATCHED if method.endswith("/Watch") else MESSAGES_READ):
            if await asyncio.wait_for(call.read(), PATIENCE_S) is grpc.aio.EOF:
                return (await call.code()).name
    except asyncio.TimeoutError:
        return "no answer"
    except grpc.aio.AioRpcError as error:
        return error.code().name
    finally:
        call.cancel()
    return "read"


async def tokens_of(channel: grpc.aio.Channel) -> list[int]:
    """The tokens of a good stream."""
    responses = inference_pb2_grpc.InferenceStub(channel).Generate(GOOD, timeout=PATIENCE_S)
    return [token_id async for response in responses for token_id in response.token_ids]


async def fuzz(
    address: str, per_method: int, seed: int, *, pid: int | None = None, told: Callable[[], object] = lambda: None
) -> Report:
    """Send `per_method` malformed requests to each method. pid: of the server. told: called after each request."""
    report = Report()
    work = iter([(method, number) for number in range(per_method) for method in METHODS])
    total, warm_bytes = per_method * len(METHODS), 0
    all_sent = False
    async with grpc.aio.insecure_channel(address) as channel, grpc.aio.insecure_channel(address) as good_channel:
        expected = await tokens_of(good_channel)
        assert len(expected) == GOOD.sampling.max_tokens

        async def good() -> None:
            while not all_sent:
                try:
                    made = await tokens_of(good_channel)
                    what = "" if made == expected else f"a good stream had the tokens {made} instead of {expected}"
                except grpc.aio.AioRpcError as error:
                    what = f"a good stream ended {error.code().name}: {error.details()}"
                report.good_streams += 1
                if what:
                    report.faults.append(("good", what, GOOD.SerializeToString()))

        async def bad() -> None:
            nonlocal warm_bytes
            for method, number in work:
                raw = malformed(seed, method, number)
                status = await status_of(channel, method, raw)
                report.statuses[status] += 1
                if status not in REFUSALS | {"OK", "read"}:
                    report.faults.append((method, status, raw))
                if pid is not None and not warm_bytes and sum(report.statuses.values()) >= WARM_UP * total:
                    warm_bytes = resident_bytes(pid)
                told()

        good_tasks = [asyncio.create_task(good()) for _ in range(GOOD_STREAMS)]
        try:
            await asyncio.gather(*(bad() for _ in range(AT_ONCE)))
        finally:
            all_sent = True
            await asyncio.gather(*good_tasks)  # they end with the stream at hand
        if await tokens_of(good_channel) != expected:
            report.faults.append(("good", "after all, a good stream had other tokens", b""))
    if pid is not None:
        report.resident_bytes = warm_bytes, resident_bytes(pid)
    return report


def resident_bytes(pid: int) -> int:
    """The memory that a process takes."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024

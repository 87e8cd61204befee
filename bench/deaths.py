"""What clients notice when a process of a deployment dies: how soon streams end, and how soon somebody answers again.

A real deployment of the embedded model, whose processes get real signals.
"""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import grpc

from bench.drover_server import ClusterShape, pid_of, serving
from bench.errors import BenchError
from bench.load import GENERATE, message
from bench.measure import longest_gap_s
from bench.process import ROOT
from bench.worker import Request
from bench.workload import prompts

CHECKPOINT, VOCAB_SIZE = ROOT / "demo" / "drover-demo", 4096
SHAPE = ClusterShape(router_threads=2, shards=2, shard_threads=1)
DEAD_AFTER_MS = 500  # the deployment file's default
VICTIMS = {"shard killed": "shard-1", "shard frozen": "shard-1", "router killed": "router-0", "frontend killed": ""}
REPEATS = 5
STREAMS, STREAM_TOKENS = 4, 1800
PROMPT_TOKENS = 32  # enough for every layer to need both shards
ATTEMPT_S, PAUSE_S = 1.0, 0.02  # of the client that tries again
FROZEN_S = 3.0
WELL_S = 4.0  # without a failure for so long, the deployment has recovered
LIMIT_S = 120.0


@dataclass(frozen=True)
class Death:
    """streams_ended_s: from the signal to the end of the last running stream. statuses: how the streams ended.
    silent_s: the longest time without an answer, from the kill or the thaw on."""

    streams_ended_s: float
    statuses: frozenset[str]
    silent_s: float


def summary(victim: str, deaths: Sequence[Death]) -> dict[str, Any]:
    """An object of results.json: median and worst of the repeats, in seconds."""
    figures: dict[str, Any] = {"victim": victim, "repeats": len(deaths)}
    for name in ("streams_ended_s", "silent_s"):
        values = [getattr(death, name) for death in deaths]
        figures |= {f"{name}_median": round(median(values), 3), f"{name}_worst": round(max(values), 3)}
    return figures | {"statuses": sorted({status for death in deaths for status in death.statuses})}


def measure_deaths(work: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Each victim, REPEATS times, in one deployment. Raises BenchError."""
    deaths: dict[str, list[Death]] = {victim: [] for victim in VICTIMS}
    with serving(CHECKPOINT, SHAPE, 64, work, DEAD_AFTER_MS) as address:
        for victim, repeat in ((victim, repeat) for repeat in range(REPEATS) for victim in VICTIMS):
            dying = _die(address, pid_of(VICTIMS[victim]), victim == "shard frozen", f"{victim} {repeat}")
            try:
                deaths[victim].append(asyncio.run(asyncio.wait_for(dying, LIMIT_S)))
            except asyncio.TimeoutError:
                raise BenchError(f"{victim}: nobody answered again within {LIMIT_S:.0f} s") from None
            death = deaths[victim][-1]
            say(
                f"  {victim}: streams ended after {death.streams_ended_s:.2f} s ({', '.join(death.statuses)}), "
                f"nobody was answered for {death.silent_s:.2f} s"
            )
    return [summary(victim, deaths[victim]) for victim in VICTIMS]


async def _die(address: str, pid: int, thaws: bool, seed: str) -> Death:
    """Kill process `pid` beside running streams, or freeze it for FROZEN_S. seed: names the prompts."""
    answers: list[float] = []
    failures: list[float] = []
    async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        generate: Any = channel.unary_stream(GENERATE)
        asking = asyncio.create_task(_ask_for_ever(generate, seed, answers, failures))
        await _until(lambda: len(answers) > 10)
        begun = [asyncio.Event() for _ in range(STREAMS)]
        streams = [
            asyncio.create_task(_ask(generate, f"{seed} stream {number}", STREAM_TOKENS, begun=event))
            for number, event in enumerate(begun)
        ]
        await asyncio.gather(*(event.wait() for event in begun))
        died_s = silent_from_s = time.monotonic()
        os.kill(pid, signal.SIGSTOP if thaws else signal.SIGKILL)
        try:
            ended = await asyncio.gather(*streams)
            if thaws:
                await asyncio.sleep(max(0.0, died_s + FROZEN_S - time.monotonic()))
        finally:
            if thaws:
                silent_from_s = time.monotonic()
                os.kill(pid, signal.SIGCONT)
        await _until(lambda: time.monotonic() > max([silent_from_s, *failures]) + WELL_S)
        asking.cancel()
    streams_ended_s = max(ended_s for ended_s, _ in ended) - died_s
    return Death(streams_ended_s, frozenset(status for _, status in ended), longest_gap_s(silent_from_s, answers))


async def _ask_for_ever(generate: Any, seed: str, answers: list[float], failures: list[float]) -> None:
    """A client that tries again: one short request after the other. Notes when each was answered, or failed."""
    for number in count():
        ended_s, status = await _ask(generate, f"{seed} {number}", 1, timeout_s=ATTEMPT_S)
        (answers if status == "OK" else failures).append(ended_s)
        await asyncio.sleep(PAUSE_S)


async def _ask(
    generate: Any, seed: str, max_tokens: int, timeout_s: float | None = None, begun: asyncio.Event | None = None
) -> tuple[float, str]:
    """When a request ended, and with which status. begun: set at its first token."""
    [prompt] = prompts(seed, 1, [PROMPT_TOKENS], VOCAB_SIZE)
    begun = begun or asyncio.Event()
    try:
        async for _ in generate(message(Request(prompt, max_tokens)), timeout=timeout_s):
            begun.set()
    except grpc.aio.AioRpcError as error:
        return time.monotonic(), error.code().name
    return time.monotonic(), "OK"


async def _until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(PAUSE_S)

"""Two frontend replicas, and two routers at the same shards: what one suffers or does is not the other's."""

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import ray

from checkpoint.config import read_config
from checkpoint.tensors import Checkpoint
from client import Client, Sampling, ServerUnavailable
from cluster.actors.remote import RemoteRouter
from cluster.actors.specs import router_spec
from cluster.launch import Deployment
from cluster.local_rays import haproxy_folder
from cluster.reports import RouterStats
from cluster.router_client import RayRouterClient
from kernels.openmp import WAITING_THREADS
from router.request import GenerationRequest, SamplingParams, request_limits
from tests.cluster.deployment import (
    MAVERICK,
    NAMESPACE,
    SharedRay,
    actor,
    http_get,
    replica_pids,
    router_stats,
)
from tests.processes import PATIENCE_S, wait_until
from tests.reference import Reference, prompt

INFERENCE = "drover.v1.Inference"
TOKENS = list(prompt(9))
STREAMS = 8  # as many as run at once


@pytest.fixture(scope="module")
def reference(reference_of: Callable[[str], Reference]) -> Reference:
    return reference_of(MAVERICK[0])


@pytest.fixture(scope="module")
def deployment(shared_ray: SharedRay, reference: Reference) -> Deployment:
    return shared_ray.serve(reference.directory, **MAVERICK[1], frontend={"replicas": 2})


@pytest.fixture
def client(deployment: Deployment) -> Iterator[Client]:
    """A client of a server that is well; afterwards both replicas must be there again."""
    with Client(deployment.address) as client:
        yield client
        wait_until(lambda: len(replica_pids()) == 2 and client.health(INFERENCE) == "SERVING")


def running() -> int:
    engine = router_stats().engine
    assert engine is not None
    return engine.running


def haproxy_pids() -> list[int]:
    """The process of HAProxy on this process's Ray, and those that a reload has replaced."""
    folder = str(haproxy_folder(os.getpid())).encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # gone
            command = entry.read_bytes().split(b"\0")
            if b"haproxy" in command[0] and any(folder in word for word in command):
                found.append(int(entry.parent.name))
    return found


@dataclass(frozen=True)
class Read:
    """What a client has read of a stream, and for how long its connection was lost, each time."""

    text: str
    token_ids: list[int]
    completion_tokens: int
    gaps_s: list[float]


@pytest.mark.parametrize("victim", ["replica", "HAProxy"])
def test_streams_go_on_whatever_dies_between_client_and_router(
    victim: str, client: Client, reference: Reference
) -> None:
    """Greedy, drawn, with stop strings and with several answers; whichever replica they were at."""
    kinds: list[Sampling] = [
        {"temperature": 0},
        {"temperature": 0.8, "seed": 5},
        {"temperature": 0.8, "seed": 6, "frequency_penalty": 0.5},
        {"temperature": 0, "stop": ["never", "ab"], "ignore_eos": True},
    ]

    def read(sampling: Sampling, began: Callable[[], object] = lambda: None) -> Read:
        stream = client.generate(TOKENS, max_tokens=300, timeout_s=PATIENCE_S, **sampling)
        deltas = [next(stream)]
        began()
        deltas += stream
        assert deltas[-1].usage is not None
        token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
        assert len({delta.request_id for delta in deltas}) == 1
        text = "".join(delta.text for delta in deltas)
        return Read(text, token_ids, deltas[-1].usage.completion_tokens, stream.gaps_s)

    expected = [read(sampling) for sampling in kinds]
    assert expected[0].token_ids == reference.greedy(TOKENS, 300)[0]
    all_began = threading.Barrier(STREAMS + 1)
    with ThreadPoolExecutor(STREAMS) as threads:
        reading = [
            threads.submit(read, kinds[number % len(kinds)], lambda: all_began.wait(PATIENCE_S))
            for number in range(STREAMS)
        ]
        all_began.wait(PATIENCE_S)
        import sys, time; print("DBG kill", round(time.time(),2), replica_pids(), haproxy_pids(), file=sys.stderr)
        for pid in replica_pids()[:1] if victim == "replica" else haproxy_pids():
            os.kill(pid, signal.SIGKILL)
        outcomes = [future.result(PATIENCE_S) for future in reading]
    for number, outcome in enumerate(outcomes):
        assert replace(outcome, gaps_s=[]) == expected[number % len(kinds)]
    print("DBG gaps", round(time.time(),2), [o.gaps_s for o in outcomes], file=sys.stderr)
    broke = sum(bool(outcome.gaps_s) for outcome in outcomes)
    if victim == "replica":
        assert 0 < broke < STREAMS  # those of the other one were left alone
    else:
        assert broke == STREAMS
    wait_until(lambda: running() == 0)  # nothing of the broken calls goes on


def test_a_client_that_does_not_resume_is_told_at_once(client: Client) -> None:
    stream = client.generate(TOKENS, max_tokens=400, temperature=0, timeout_s=PATIENCE_S, resume_s=0)
    next(stream)
    for pid in haproxy_pids():
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(ServerUnavailable):
        list(stream)


def test_both_replicas_serve_and_cancel_and_show_the_same_counts(client: Client, deployment: Deployment) -> None:
    streams = [client.generate(TOKENS, max_tokens=400, ignore_eos=True) for _ in range(STREAMS)]
    for stream in streams:
        next(stream)
    assert router_stats().frontends >= 2  # one that was killed is counted for a while
    for stream in streams:
        stream.close()
    wait_until(lambda: running() == 0)
    pages = {count_of(http_get(deployment, "/metrics")[2], "drover_generation_tokens_total") for _ in range(6)}
    assert len(pages) == 1  # whichever replica answers, and nothing runs meanwhile


def count_of(page: str, name: str) -> float:
    [line] = [line for line in page.splitlines() if line.startswith(name + "{")]
    return float(line.rpartition(" ")[2])


@pytest.fixture
def second_router(deployment: Deployment) -> Iterator[str]:
    """The name of another router at the deployment's shards."""
    config, name = deployment.config, "router-1"
    spec = replace(router_spec(config, Checkpoint.open(config.checkpoint)), name=name)
    options = {"name": name, "namespace": NAMESPACE, "num_cpus": 0, "max_concurrency": 1000}
    environment = {"env_vars": WAITING_THREADS}
    handle = ray.remote(RemoteRouter).options(**options, runtime_env=environment).remote(spec)
    try:
        wait_until(lambda: ray.get(handle.readiness.remote(), timeout=PATIENCE_S).ready)
        yield name
    finally:
        ray.kill(handle)


def test_two_routers_at_the_same_shards_compute_what_one_alone_does(
    client: Client, deployment: Deployment, reference: Reference, second_router: str
) -> None:
    expected = reference.greedy(TOKENS, 300)[0]
    limits = request_limits(read_config(deployment.config.checkpoint), None)
    both_began = threading.Barrier(2)

    async def over_the_second() -> list[int]:
        router = RayRouterClient(second_router, NAMESPACE, limits)
        request = GenerationRequest("only", TOKENS, SamplingParams(max_tokens=300, temperature=0.0))
        token_ids: list[int] = []
        async for delta in router.generate([request]):
            if not token_ids:
                await asyncio.to_thread(both_began.wait, PATIENCE_S)
            token_ids += delta.token_ids
        return token_ids

    def over_the_first() -> list[int]:
        stream = client.generate(TOKENS, max_tokens=300, temperature=0, timeout_s=PATIENCE_S)
        token_ids = list(next(stream).token_ids)
        both_began.wait(PATIENCE_S)
        return token_ids + [token_id for delta in stream for token_id in delta.token_ids]

    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(over_the_first)
        second = asyncio.run(asyncio.wait_for(over_the_second(), PATIENCE_S))
        assert first.result(PATIENCE_S) == expected
    assert second == expected
    for shard in ("shard-0", "shard-1"):
        links = ray.get(actor(shard).stats.remote(), timeout=PATIENCE_S).links
        assert len(links) == 2, links
    stats: RouterStats = ray.get(actor(second_router).stats.remote(), timeout=PATIENCE_S)
    assert stats.engine is not None
    assert stats.engine.generated_tokens == 300


def test_a_router_that_dies_leaves_the_other_ones_streams_alone(
    client: Client, reference: Reference, second_router: str
) -> None:
    stream = client.generate(TOKENS, max_tokens=400, temperature=0, timeout_s=PATIENCE_S)
    token_ids = list(next(stream).token_ids)
    ray.kill(actor(second_router))
    token_ids += [token_id for delta in stream for token_id in delta.token_ids]
    assert token_ids == reference.greedy(TOKENS, 400)[0]

"""Shards of which each expert has two: killed, frozen and slow under streams, none of which notices."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray

from checkpoint.config import read_config
from client import Client
from cluster.launch import Deployment
from cluster.reports import RouterStats
from tests.cluster.deployment import MAVERICK, SharedRay, actor, pid_of, router_stats
from tests.processes import PATIENCE_S, wait_until
from tests.reference import Reference, prompt

STREAMS, TOKENS = 8, 300
PROMPTS = [list(prompt(9 + nth, seed=nth)) for nth in range(STREAMS)]
SHARDS = ("shard-0", "shard-1", "shard-2")


@pytest.fixture(scope="module")
def reference(reference_of: Callable[[str], Reference]) -> Reference:
    return reference_of(MAVERICK[0])


@pytest.fixture(scope="module")
def deployment(shared_ray: SharedRay, reference: Reference) -> Deployment:
    shards = {"count": len(SHARDS), "cpus": 0.1}
    return shared_ray.serve(reference.directory, **MAVERICK[1] | {"shards": shards}, placement={"replicas": 2})


@pytest.fixture
def client(deployment: Deployment) -> Iterator[Client]:
    """A client of a deployment whose shards are all linked; afterwards they must be again."""
    with Client(deployment.address) as client:
        yield client
        wait_until(lambda: not stats().down)


def stats() -> RouterStats:
    found = router_stats()
    assert found.engine is not None
    return found


@pytest.fixture(scope="module")
def expected(reference: Reference) -> list[list[int]]:
    return [reference.greedy(token_ids, TOKENS)[0] for token_ids in PROMPTS]


def amid_streams(client: Client, deed: Callable[[], None]) -> list[list[int]]:
    """What STREAMS streams tell that all run when `deed` is done."""
    all_began = threading.Barrier(STREAMS + 1)

    def read(token_ids: list[int]) -> list[int]:
        with client.generate(token_ids, max_tokens=TOKENS, temperature=0, timeout_s=PATIENCE_S, resume_s=0) as stream:
            told = list(next(stream).token_ids)
            all_began.wait(PATIENCE_S)
            return told + [token_id for delta in stream for token_id in delta.token_ids]

    with ThreadPoolExecutor(STREAMS) as threads:
        reading = [threads.submit(read, token_ids) for token_ids in PROMPTS]
        all_began.wait(PATIENCE_S)
        deed()
        return [future.result(PATIENCE_S) for future in reading]


@pytest.mark.parametrize("name", SHARDS)
def test_a_killed_shard_costs_no_stream_anything(client: Client, expected: list[list[int]], name: str) -> None:
    before = stats().retries.get("lost", 0)
    assert amid_streams(client, lambda: os.kill(pid_of(name), signal.SIGKILL)) == expected
    assert stats().retries["lost"] > before


def test_a_frozen_shard_costs_no_stream_anything(client: Client, expected: list[list[int]]) -> None:
    pid = pid_of("shard-1")
    before = stats().retries.get("late", 0) + stats().retries.get("lost", 0)
    try:
        assert amid_streams(client, lambda: os.kill(pid, signal.SIGSTOP)) == expected
    finally:
        os.kill(pid, signal.SIGCONT)
    assert stats().retries.get("late", 0) + stats().retries.get("lost", 0) > before
    assert pid_of("shard-1") == pid


def test_every_expert_is_held_twice(client: Client, reference: Reference) -> None:
    held = [ray.get(actor(name).stats.remote(), timeout=PATIENCE_S).experts_held for name in SHARDS]
    config = read_config(reference.directory)
    assert sum(held) == 2 * len(config.moe_layers) * config.num_experts

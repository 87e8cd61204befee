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
from tests.cluster.deployment import actor, pid_of
from tests.cluster.two_of_each import ROUTERS, SHARDS, stats_of
from tests.processes import PATIENCE_S, wait_until
from tests.reference import Reference, prompt

STREAMS, TOKENS = 8, 300
PROMPTS = [list(prompt(9 + nth, seed=nth)) for nth in range(STREAMS)]


@pytest.fixture
def client(two_of_each: Deployment) -> Iterator[Client]:
    """A client of a deployment whose shards are all linked; afterwards they must be again."""
    with Client(two_of_each.address) as client:
        yield client
        wait_until(lambda: not any(stats_of(router).down for router in ROUTERS))


def retries(*reasons: str) -> int:
    """Of both routers."""
    return sum(stats_of(router).retries.get(reason, 0) for router in ROUTERS for reason in reasons)


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
    before = retries("lost")
    assert amid_streams(client, lambda: os.kill(pid_of(name), signal.SIGKILL)) == expected
    assert retries("lost") > before


def test_a_frozen_shard_costs_no_stream_anything(client: Client, expected: list[list[int]]) -> None:
    pid = pid_of("shard-1")
    before = retries("late", "lost")
    try:
        assert amid_streams(client, lambda: os.kill(pid, signal.SIGSTOP)) == expected
    finally:
        os.kill(pid, signal.SIGCONT)
    assert retries("late", "lost") > before
    assert pid_of("shard-1") == pid


def test_every_expert_is_held_twice(client: Client, reference: Reference) -> None:
    held = [ray.get(actor(name).stats.remote(), timeout=PATIENCE_S).experts_held for name in SHARDS]
    config = read_config(reference.directory)
    assert sum(held) == 2 * len(config.moe_layers) * config.num_experts

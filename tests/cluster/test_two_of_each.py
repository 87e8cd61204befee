"""Two frontends, and two routers at the same two shards: what one suffers or does is not the other's."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import ray

from client import Client, Sampling, ServerUnavailable
from cluster.launch import Deployment
from tests.cluster.deployment import actor, http_get, pid_of, replica_pids
from tests.cluster.haproxy import haproxy_pids, replicas_it_calls
from tests.cluster.two_of_each import RESTART_S, ROUTERS, is_well, stats_of
from tests.processes import PATIENCE_S, wait_until
from tests.reference import Reference, prompt

INFERENCE = "drover.v1.Inference"
TOKENS = list(prompt(9))
STREAMS = 8  # as many as run at once
LENGTH = 200  # tokens of an answer, which take far longer than to kill something


@pytest.fixture
def client(two_of_each: Deployment) -> Iterator[Client]:
    """A client of a server that is well; afterwards all replicas and routers must be there again.

    A server is up as soon as HAProxy calls one of its replicas.
    """
    wait_until(lambda: replicas_it_calls() == 2)
    with Client(two_of_each.address) as client:
        yield client
        wait_until(lambda: len(replica_pids()) == 2 and serves(client))
        for name in ROUTERS:
            wait_until(lambda name=name: is_well(name), RESTART_S)


def serves(client: Client) -> bool:
    """Also asked while HAProxy is being started again."""
    try:
        return client.health(INFERENCE) == "SERVING"
    except ServerUnavailable:
        return False


def running(name: str) -> int:
    engine = stats_of(name).engine
    return 0 if engine is None else engine.running


class Streams:
    """As many streams as run at once, of the same prompt, and what their clients have."""

    def __init__(self, client: Client, **options: float) -> None:
        self._client, self._options = client, options
        self._all_began = threading.Barrier(STREAMS + 1)
        self._threads = ThreadPoolExecutor(STREAMS)
        self._reading = [self._threads.submit(self._read) for _ in range(STREAMS)]
        self._all_began.wait(PATIENCE_S)

    def outcomes(self) -> list[list[int] | ServerUnavailable]:
        """The tokens of each stream, or why it ended, once all have."""
        with self._threads:
            return [future.result(PATIENCE_S) for future in self._reading]

    def _read(self) -> list[int] | ServerUnavailable:
        stream = self._client.generate(TOKENS, max_tokens=LENGTH, temperature=0, timeout_s=PATIENCE_S, **self._options)
        token_ids = list(next(stream).token_ids)
        self._all_began.wait(PATIENCE_S)
        try:
            return token_ids + [token_id for delta in stream for token_id in delta.token_ids]
        except ServerUnavailable as error:
            return error


def test_a_killed_replica_ends_its_own_streams_only(client: Client, reference: Reference) -> None:
    streams = Streams(client, resume_s=0)
    os.kill(replica_pids()[0], signal.SIGKILL)
    outcomes = streams.outcomes()
    survivors = [outcome for outcome in outcomes if not isinstance(outcome, ServerUnavailable)]
    assert 0 < len(survivors) < STREAMS, outcomes
    assert survivors == [reference.greedy(TOKENS, LENGTH)[0]] * len(survivors)
    # The routers have noticed who is gone.
    wait_until(lambda: running("router-0") == running("router-1") == 0)


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
    """Greedy, drawn, with penalties and with stop strings; whichever replica they were at."""
    kinds: list[Sampling] = [
        {"temperature": 0},
        {"temperature": 0.8, "seed": 5},
        {"temperature": 0.8, "seed": 6, "frequency_penalty": 0.5},
        {"temperature": 0, "stop": ["never", "ab"], "ignore_eos": True},
    ]

    def read(sampling: Sampling, began: Callable[[], object] = lambda: None) -> Read:
        stream = client.generate(TOKENS, max_tokens=LENGTH, timeout_s=PATIENCE_S, **sampling)
        deltas = [next(stream)]
        began()
        deltas += stream
        assert deltas[-1].usage is not None
        token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
        assert len({delta.request_id for delta in deltas}) == 1
        text = "".join(delta.text for delta in deltas)
        return Read(text, token_ids, deltas[-1].usage.completion_tokens, stream.gaps_s)

    expected = [read(sampling) for sampling in kinds]
    assert expected[0].token_ids == reference.greedy(TOKENS, LENGTH)[0]
    all_began = threading.Barrier(STREAMS + 1)
    with ThreadPoolExecutor(STREAMS) as threads:
        reading = [
            threads.submit(read, kinds[number % len(kinds)], lambda: all_began.wait(PATIENCE_S))
            for number in range(STREAMS)
        ]
        all_began.wait(PATIENCE_S)
        for pid in replica_pids()[:1] if victim == "replica" else haproxy_pids():
            os.kill(pid, signal.SIGKILL)
        outcomes = [future.result(PATIENCE_S) for future in reading]
    for number, outcome in enumerate(outcomes):
        assert replace(outcome, gaps_s=[]) == expected[number % len(kinds)]
    assert any(outcome.gaps_s for outcome in outcomes)
    # Nothing of the broken calls goes on.
    wait_until(lambda: running("router-0") == running("router-1") == 0)


def test_a_client_that_does_not_resume_is_told_at_once(client: Client) -> None:
    stream = client.generate(TOKENS, max_tokens=400, temperature=0, timeout_s=PATIENCE_S, resume_s=0)
    next(stream)
    for pid in haproxy_pids():
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(ServerUnavailable):
        list(stream)


def test_both_replicas_serve_and_cancel_and_show_the_same_counts(client: Client, two_of_each: Deployment) -> None:
    streams = [client.generate(TOKENS, max_tokens=400, ignore_eos=True) for _ in range(STREAMS)]
    for stream in streams:
        next(stream)
    for name in ROUTERS:
        assert stats_of(name).frontends >= 2  # one that was killed is counted for a while
    for stream in streams:
        stream.close()
    wait_until(lambda: running("router-0") == running("router-1") == 0)
    pages = {counts_of(http_get(two_of_each, "/metrics")[2], "drover_generation_tokens_total") for _ in range(6)}
    assert len(pages) == 1  # whichever replica answers, and nothing runs meanwhile


def counts_of(page: str, name: str) -> tuple[float, ...]:
    """Of each router."""
    lines = [line for line in page.splitlines() if line.startswith(name + "{")]
    assert len(lines) == len(ROUTERS)
    return tuple(float(line.rpartition(" ")[2]) for line in sorted(lines))


def test_two_routers_share_the_load_and_the_shards(client: Client, reference: Reference) -> None:
    made = {name: stats_of(name).engine.generated_tokens for name in ROUTERS}
    assert Streams(client).outcomes() == [reference.greedy(TOKENS, LENGTH)[0]] * STREAMS
    shares = [stats_of(name).engine.generated_tokens - made[name] for name in ROUTERS]
    assert sum(shares) == STREAMS * LENGTH
    assert min(shares) >= LENGTH
    for shard in ("shard-0", "shard-1"):
        links = ray.get(actor(shard).stats.remote(), timeout=PATIENCE_S).links
        assert len(links) == 2, links


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_router_that_dies_or_hangs_fails_no_stream(client: Client, reference: Reference, how: signal.Signals) -> None:
    replayed = stats_of("router-0").engine.replayed
    streams, pid = Streams(client, resume_s=0), pid_of("router-1")
    had = running("router-1")
    assert had
    began_s = time.monotonic()
    os.kill(pid, how)
    try:
        assert streams.outcomes() == [reference.greedy(TOKENS, LENGTH)[0]] * STREAMS
        assert stats_of("router-0").engine.replayed - replayed == had
        print(f"{how.name}: {time.monotonic() - began_s:.2f} s to the end of all")
    finally:
        if how is signal.SIGSTOP:
            os.kill(pid, signal.SIGCONT)
    if how is signal.SIGSTOP:
        wait_until(lambda: is_well("router-1") and running("router-1") == 0)  # it has forgotten what it had
        assert pid_of("router-1") == pid

"""Real processes killed and frozen, without replicas: streams wait for the replacement, and go on."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray

from client import Client, DeadlineExceeded
from cluster import status
from cluster.launch import Deployment
from cluster.names import CONTROLLER
from cluster.reports import Phase, RouterStats
from cluster.status import PartStatus, read_status
from experts.groups.nccl import NCCL_ENVIRONMENT
from frontend.metrics.page import CONTENT_TYPE
from frontend.router_client import Readiness
from kernels.openmp import WAITING_THREADS
from tests.cluster.deployment import MAVERICK, NAMESPACE, SharedRay, actor, http_get, pid_of, router_stats
from tests.processes import PATIENCE_S, wait_until
from tests.reference import Reference, prompt

INFERENCE = "drover.v1.Inference"
TOKENS = list(prompt(9))
RESTART_S = 120.0


@pytest.fixture(scope="module")
def reference(reference_of: Callable[[str], Reference]) -> Reference:
    return reference_of(MAVERICK[0])


@pytest.fixture(scope="module")
def deployment(shared_ray: SharedRay, reference: Reference) -> Deployment:
    return shared_ray.serve(reference.directory, **MAVERICK[1])


@pytest.fixture
def client(deployment: Deployment) -> Iterator[Client]:
    """A client of a server that is well; afterwards it must be well again."""
    with Client(deployment.address) as client:
        yield client
        wait_until(lambda: client.health(INFERENCE) == "SERVING", RESTART_S)


def shard_1() -> PartStatus:
    return next(part for part in read_status(NAMESPACE).parts if part.name == "shard-1")


def greedy(client: Client, count: int) -> list[int]:
    stream = client.generate(TOKENS, max_tokens=count, temperature=0, timeout_s=PATIENCE_S, resume_s=0)
    return [token_id for delta in stream for token_id in delta.token_ids]


@pytest.mark.parametrize("name", ["router-0", "shard-0"])
def test_processes_begin_with_what_torch_reads_before_anything(name: str, deployment: Deployment) -> None:
    """Else a failed NCCL communicator, or one that hangs, would end the whole process."""
    assert deployment
    begun_with = Path(f"/proc/{pid_of(name)}/environ").read_text().split("\0")
    assert {f"{key}={value}" for key, value in (NCCL_ENVIRONMENT | WAITING_THREADS).items()} <= set(begun_with)


def readiness() -> Readiness:
    answer: Readiness = ray.get(actor("router-0").readiness.remote(), timeout=PATIENCE_S)
    return answer


def stats() -> RouterStats:
    found = router_stats()
    assert found.engine is not None
    return found


def test_streams_wait_for_a_killed_shard_and_go_on(client: Client, reference: Reference) -> None:
    with ThreadPoolExecutor(1) as thread:
        stream = client.generate(TOKENS, max_tokens=400, temperature=0, timeout_s=RESTART_S, resume_s=0)
        token_ids = list(next(stream).token_ids)
        os.kill(pid_of("shard-1"), signal.SIGKILL)
        rest = thread.submit(lambda: [token_id for delta in stream for token_id in delta.token_ids])
        wait_until(lambda: "shard-1" in stats().down)
        assert client.health(INFERENCE) == "SERVING"  # new requests are taken, and wait
        assert "shard-1: " in readiness().degraded
        assert greedy(client, 40) == reference.greedy(TOKENS, 40)[0]
        assert token_ids + rest.result(RESTART_S) == reference.greedy(TOKENS, 400)[0]
    assert stats().retries["lost"] > 0
    wait_until(lambda: readiness().degraded == "")


def test_while_a_shard_is_frozen_streams_wait_and_can_still_end(client: Client, reference: Reference) -> None:
    pid = pid_of("shard-0")
    stream = client.generate(TOKENS, max_tokens=400, temperature=0, timeout_s=RESTART_S, resume_s=0)
    token_ids = list(next(stream).token_ids)
    leaving = client.generate(TOKENS, max_tokens=400, temperature=0, resume_s=0)
    next(leaving)
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: "shard-0" in stats().down)
        leaving.close()
        wait_until(lambda: stats().engine.running == 1)  # its memory is free while the step still waits
        with pytest.raises(DeadlineExceeded):
            list(client.generate(TOKENS, max_tokens=4, timeout_s=1.0))
    finally:
        os.kill(pid, signal.SIGCONT)
    token_ids += [token_id for delta in stream for token_id in delta.token_ids]
    assert token_ids == reference.greedy(TOKENS, 400)[0]
    assert pid_of("shard-0") == pid


def test_status_waits_for_all_hung_parts_together(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "TIMEOUT_S", 1.0)
    pids = [pid_of(name) for name in ("shard-0", "shard-1", CONTROLLER)]
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        began_s = time.monotonic()
        found = read_status(NAMESPACE)
        took_s = time.monotonic() - began_s
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    errors = {part.name: part.error for part in found.parts}
    assert errors == {"router-0": "", "shard-0": "did not answer within 1 s", "shard-1": "did not answer within 1 s"}
    assert found.wanted is None
    assert took_s < 2.0  # 1 s, and Ray's own time


def test_a_load_that_fails_is_tried_again_and_status_says_why(client: Client, reference: Reference) -> None:
    """The checkpoint is away while a shard starts again; once it is back, so is the shard."""
    home, away = reference.directory, reference.directory.with_name("away")
    home.rename(away)
    try:
        os.kill(pid_of("shard-1"), signal.SIGKILL)
        wait_until(lambda: shard_1().state is not None and shard_1().state.phase is Phase.FAILED, RESTART_S)
        state = shard_1().state
        assert state is not None
        assert str(home) in state.error
        assert state.retry_s is not None
        wait_until(lambda: re.search(f"failed: .*{home.name}.*; next try in", stats().down["shard-1"]) is not None)
    finally:
        away.rename(home)
    assert greedy(client, 40) == reference.greedy(TOKENS, 40)[0]
    wait_until(lambda: shard_1().state.error == "")


def test_streams_of_the_only_router_wait_for_it_and_go_on(
    client: Client, deployment: Deployment, reference: Reference
) -> None:
    stream = client.generate(TOKENS, max_tokens=400, temperature=0, timeout_s=PATIENCE_S, resume_s=0)
    token_ids = list(next(stream).token_ids)
    pid = pid_of("router-0")
    os.kill(pid, signal.SIGSTOP)  # a killed one might be back before the page is asked for
    code, content_type, page = http_get(deployment, "/metrics")
    assert (code, content_type) == (200, CONTENT_TYPE)
    assert page.startswith("# router-0 ")
    assert 'part="router-0"} 0.0\n' in page
    os.kill(pid, signal.SIGKILL)
    with ThreadPoolExecutor(1) as thread:
        late = thread.submit(greedy, client, 40)  # one that comes meanwhile waits, too
        token_ids += [token_id for delta in stream for token_id in delta.token_ids]
        assert token_ids == reference.greedy(TOKENS, 400)[0]
        assert late.result(PATIENCE_S) == reference.greedy(TOKENS, 40)[0]
    assert router_stats().engine.replayed >= 1
    _, _, page = http_get(deployment, "/metrics")
    assert re.search(r'drover_requests_replayed_total\{.*reason="(lost|silent)",router="router-0"\} [12]\.0', page)

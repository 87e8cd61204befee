"""Several nodes: the head's death, a drained node and a lost one, under streams of clients elsewhere."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import yaml

from client import Client, ServerUnavailable
from tests.cluster.commands import NAMESPACE
from tests.cluster.hosts import GRPC_PORT, Hosts, missing
from tests.processes import PATIENCE_S, wait_until
from tests.reference import Reference, prompt

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]

TOKENS, MANY, STREAMS = list(prompt(9)), 400, 4
# Ray's own detector takes 15 s; these are what docs/cluster.md proposes.
DETECTOR = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}


@pytest.fixture(scope="module")
def reference(reference_of: Callable[[str], Reference]) -> Reference:
    return reference_of("maverick")


@pytest.fixture(scope="module")
def hosts(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """A head without room, and two workers, each with room for all parts, which fit on one."""
    raw = {
        "checkpoint": str(reference.directory),
        "ray": {"namespace": NAMESPACE, "address": "auto"},
        "router": {"cpus": 0.5},
        "shards": {"count": 2, "cpus": 0.25},
        "placement": {"replicas": 2},
        "links": {"dead_after_ms": 3000},
        "frontend": {"host": "0.0.0.0", "grpc_port": GRPC_PORT, "replicas": 3},
    }
    path = tmp_path_factory.mktemp("hosts") / "deployment.yaml"
    with Hosts([0, 1, 1], **DETECTOR) as hosts:
        path.write_text(yaml.safe_dump(raw | {"ray": {"namespace": NAMESPACE, "address": hosts.ray_address}}))
        served = hosts.drover(0, "serve", str(path), "--detach")
        assert "is served on" in served.stdout, served.stderr
        yield hosts


def status(hosts: Hosts, host: int = 1) -> dict[str, Any]:
    told = hosts.drover(host, "status", "--json", "--namespace", NAMESPACE, "--ray-address", hosts.ray_address)
    assert told.returncode == 0, told.stderr
    status: dict[str, Any] = json.loads(told.stdout)
    return status


def nodes_of_parts(hosts: Hosts) -> dict[str, str]:
    told = status(hosts)
    return {part["name"]: part["node"] for part in told["routers"] + told["shards"]}


@contextmanager
def streams(address: str, expected: list[int]) -> Iterator[Callable[[], None]]:
    """Streams that are read one after the other, by several clients at once; each must have the expected tokens.

    Gives a function that returns once each client has begun and ended another stream.
    """
    over = threading.Event()
    ended = [0] * STREAMS

    def read(number: int) -> None:
        with Client(address) as client:
            while not over.is_set():
                stream = client.generate(TOKENS, max_tokens=MANY, temperature=0, timeout_s=2 * PATIENCE_S)
                assert [token_id for delta in stream for token_id in delta.token_ids] == expected
                ended[number] += 1

    with ThreadPoolExecutor(STREAMS) as threads:
        reading = [threads.submit(read, number) for number in range(STREAMS)]

        def wait_for_more() -> None:
            seen = list(ended)
            wait_until(
                lambda: (
                    any(future.done() for future in reading)
                    or all(count >= before + 2 for count, before in zip(ended, seen, strict=True))
                ),
                2 * PATIENCE_S,
            )

        try:
            wait_for_more()
            yield wait_for_more
            wait_for_more()
        finally:
            over.set()
            for future in reading:
                future.result(2 * PATIENCE_S)


def accepts(address: str) -> bool:
    """Whether gRPC is served there: on the head, and on each node with a frontend replica."""
    with Client(address) as client:
        try:
            return client.health(timeout_s=5.0) == "SERVING"
        except ServerUnavailable:
            return False


FLAGS = ("--namespace", NAMESPACE, "--ray-address")


def test_streams_go_on_without_the_head_which_finds_everything_again(hosts: Hosts, reference: Reference) -> None:
    before = nodes_of_parts(hosts)
    address = next(address for address in map(hosts.grpc_address, (1, 2)) if accepts(address))
    with streams(address, reference.greedy(TOKENS, MANY)[0]) as wait_for_more:
        hosts.kill(0)
        wait_for_more()
        hosts.start(0)
        wait_for_more()
    assert nodes_of_parts(hosts) == before
    told = status(hosts)
    assert {part["restarts"] for part in told["routers"] + told["shards"]} == {0}
    refused = hosts.drover(0, "drain", "router-0", *FLAGS, hosts.ray_address)
    assert "router-0 is the last router that serves" in refused.stderr
    wait_until(lambda: accepts(hosts.grpc_address(0)))


def test_a_drained_node_is_left_by_all_parts_and_its_loss_is_not_noticed(hosts: Hosts, reference: Reference) -> None:
    drained_host, other = hosts_of_router(hosts)
    target = hosts.address(drained_host)
    with streams(hosts.grpc_address(0), reference.greedy(TOKENS, MANY)[0]) as wait_for_more:
        drained = hosts.drover(0, "drain", target, "--grace-s", "2", *FLAGS, hosts.ray_address)
        assert drained.stdout == f"{target} is drained\n", drained.stderr
        assert {*nodes_of_parts(hosts).values()} == {hosts.address(other)}
        wait_for_more()
        hosts.kill(drained_host)
        wait_for_more()
        hosts.start(drained_host)


def test_a_lost_nodes_parts_start_on_another_with_room(hosts: Hosts, reference: Reference) -> None:
    """They were moved there, and Ray has reserved their own bundles on the other node."""
    lost_host, other = hosts_of_router(hosts)
    with streams(hosts.grpc_address(0), reference.greedy(TOKENS, MANY)[0]) as wait_for_more:
        hosts.kill(lost_host)
        wait_until(lambda: {*nodes_of_parts(hosts).values()} == {hosts.address(other)}, 2 * PATIENCE_S)
        wait_for_more()


def hosts_of_router(hosts: Hosts) -> tuple[int, int]:
    """The worker that has the router, and the other one."""
    address = nodes_of_parts(hosts)["router-0"]
    host = next(host for host in (1, 2) if hosts.address(host) == address)
    return host, 3 - host

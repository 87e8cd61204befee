"""A deployment whose experts move while it serves: no stream notices, whoever is killed at whatever phase."""

import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from checkpoint.config import read_config
from checkpoint.errors import DroverError
from client import Client
from cluster.actors.failpoints import VARIABLE
from cluster.controller_client import ControllerClient
from cluster.launch import Deployment
from cluster.reports import OperationStatus
from experts.placement import Placement, even_placement
from tests.cluster.deployment import MAVERICK, NAMESPACE, SharedRay, actor, pid_of
from tests.processes import PATIENCE_S, wait_until
from tests.reference import Reference, prompt

SHARDS, SLOTS, STREAMS, TOKENS = 3, 64, 3, 60
CHANGES = MAVERICK[1] | {
    "router": {"count": 2, "cpus": 0.25},
    "shards": {"count": SHARDS, "cpus": 0.1, "slots": SLOTS},
}
PROMPTS = [list(prompt(9 + nth, seed=nth)) for nth in range(STREAMS)]
RESTART_S = 120.0
numbers = itertools.count()


@pytest.fixture(scope="module")
def reference(reference_of: Callable[[str], Reference]) -> Reference:
    return reference_of(MAVERICK[0])


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the deployment's failpoints."""
    folder = tmp_path_factory.mktemp("points")
    os.environ[VARIABLE] = str(folder)
    yield folder
    del os.environ[VARIABLE]


@pytest.fixture(scope="module")
def deployment(shared_ray: SharedRay, reference: Reference, points: Path) -> Iterator[Deployment]:
    assert points.exists()
    yield shared_ray.serve(reference.directory, **CHANGES)
    shared_ray.clear()  # nobody else has points


@pytest.fixture(scope="module")
def expected(reference: Reference) -> list[list[int]]:
    return [reference.greedy(token_ids, TOKENS)[0] for token_ids in PROMPTS]


@pytest.fixture(scope="module")
def client(deployment: Deployment) -> Iterator[Client]:
    with Client(deployment.address) as client:
        yield client


@pytest.fixture
def controller(deployment: Deployment) -> ControllerClient:
    """That of a deployment that is well, with all orders followed."""
    assert deployment
    controller = ControllerClient(NAMESPACE)
    wait_until(all_follow, RESTART_S)
    return controller


def current() -> Placement:
    placement: Placement = ray.get(actor("controller").placement.remote(), timeout=PATIENCE_S)
    return placement


def stats_of(name: str) -> Any:
    """ShardStats or RouterStats."""
    return ray.get(actor(name).stats.remote(), timeout=PATIENCE_S)


def all_follow() -> bool:
    """Whether shards hold, and routers route, just what the controller wants, and all are linked."""
    try:
        placement = current()
        for number in range(SHARDS):
            stats = stats_of(f"shard-{number}")
            if (stats.experts_held, stats.missing) != (len(placement.slots_of(number)), 0):
                return False
        routers = [stats_of(f"router-{number}") for number in range(2)]
        return all((router.epoch, router.down) == (placement.epoch, {}) for router in routers)
    except (ValueError, ray.exceptions.RayError):
        return False


def rotated(reference: Reference, by: int) -> Placement:
    config = read_config(reference.directory)
    even = even_placement(config.moe_layers, config.num_experts, SHARDS)
    shards_of = {
        layer: tuple(tuple((shard + by) % SHARDS for shard in shards) for shards in by_expert)
        for layer, by_expert in even.shards_of.items()
    }
    return replace(even, shards_of=shards_of)


@pytest.fixture
def target(reference: Reference, controller: ControllerClient) -> Placement:
    """One in which every expert is elsewhere than now."""
    now = current()
    return next(
        rotated(reference, by)
        for by in range(SHARDS)
        if all(
            not {*shards} & {*others}
            for layer, by_expert in rotated(reference, by).shards_of.items()
            for shards, others in zip(by_expert, now.shards_of[layer], strict=True)
        )
    )


@contextmanager
def streams(client: Client, expected: list[list[int]]) -> Iterator[None]:
    """Streams that run one after the other, several at once; each must tell what is expected."""
    is_over, began = threading.Event(), threading.Barrier(STREAMS + 1)

    def read(nth: int) -> None:
        first = True
        while first or not is_over.is_set():
            stream = client.generate(PROMPTS[nth], max_tokens=TOKENS, temperature=0, timeout_s=RESTART_S, resume_s=0)
            told = list(next(stream).token_ids)
            if first:
                began.wait(PATIENCE_S)
            told += [token_id for delta in stream for token_id in delta.token_ids]
            assert told == expected[nth]
            first = False

    with ThreadPoolExecutor(STREAMS) as threads:
        reading = [threads.submit(read, nth) for nth in range(STREAMS)]
        began.wait(PATIENCE_S)
        try:
            yield
        finally:
            is_over.set()
        for future in reading:
            future.result(RESTART_S)


def outcome(controller: ControllerClient, operation_id: str) -> OperationStatus:
    """Of an operation, once it has ended. Until then the deployment is ready."""
    found: list[OperationStatus] = []

    def has_ended() -> bool:
        status = controller.operation(operation_id)
        assert status is not None
        found[:] = [status]
        return status.has_ended

    wait_until(has_ended, RESTART_S)
    return found[0]


def test_experts_move_under_streams(
    client: Client, controller: ControllerClient, target: Placement, expected: list[list[int]]
) -> None:
    operation_id, epoch = f"op-{next(numbers)}", current().epoch
    with streams(client, expected):
        controller.change(operation_id, target, "rebalance")
        controller.change(operation_id, target, "rebalance")  # asked again, it goes on
        with pytest.raises(DroverError, match=rf"operation {operation_id} \(rebalance\) is under way"):
            controller.change("another", target, "rebalance")
        status = outcome(controller, operation_id)
        assert client.health("drover.v1.Inference") == "SERVING"
    assert (status.phase, status.reason) == ("done", "")
    assert current().epoch == epoch + status.steps
    assert status.moved_bytes == status.total_bytes > 0
    wait_until(all_follow)
    assert {name: stats_of(f"shard-{name}").experts_held for name in range(SHARDS)} == {
        number: len(target.slots_of(number)) for number in range(SHARDS)
    }
    assert not any(stats_of(f"router-{number}").retries for number in range(2))


PHASES, VICTIMS = ("prepare", "commit", "retire"), ("shard-1", "router-0", "controller")
OFTEN = set(zip(PHASES, VICTIMS, strict=True))
CASES = [
    pytest.param(phase, victim, marks=[] if (phase, victim) in OFTEN else pytest.mark.slow)
    for phase in PHASES
    for victim in VICTIMS
]


@pytest.mark.parametrize(("phase", "victim"), CASES)
def test_whoever_is_killed_the_change_is_made(
    phase: str,
    victim: str,
    client: Client,
    controller: ControllerClient,
    points: Path,
    target: Placement,
    expected: list[list[int]],
) -> None:
    operation_id = f"op-{next(numbers)}"
    point = points / f"controller.{phase}"
    pid = pid_of(victim)
    point.with_suffix(".tmp").write_text(f"kill {pid} {int(signal.SIGKILL)}")
    point.with_suffix(".tmp").rename(point)
    with streams(client, expected):
        controller.change(operation_id, target, "rebalance")
        status = outcome(controller, operation_id)
    assert point.with_name(f"{point.name}.hit").exists()
    point.with_name(f"{point.name}.hit").unlink()
    assert (status.phase, status.reason) == ("done", "")
    assert pid_of(victim) != pid
    assert current().shards_of == target.shards_of
    wait_until(all_follow, RESTART_S)


def test_an_aborted_change_lets_go_of_what_was_prepared(
    client: Client, controller: ControllerClient, points: Path, target: Placement, expected: list[list[int]]
) -> None:
    operation_id, before = f"op-{next(numbers)}", current()
    (points / "shard-1.prepare").write_text("block")
    try:
        with streams(client, expected):
            controller.change(operation_id, target, "rebalance")
            wait_until(lambda: stats_of("shard-0").missing == 0 and stats_of("shard-0").experts_held > 2 * 43)
            controller.abort(operation_id)
            status = outcome(controller, operation_id)
    finally:
        (points / "shard-1.prepare").unlink()
    assert (status.phase, status.reason) == ("aborted", "as was asked for")
    assert current() == before
    wait_until(all_follow)

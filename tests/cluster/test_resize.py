"""Numbers of parts change amid streams, whatever dies meanwhile; no stream notices, and every token is right."""

import os
import signal
from collections.abc import Callable, Iterator

import pytest

from checkpoint.errors import DroverError
from client import Client
from cluster.controller_client import ControllerClient
from cluster.launch import Deployment
from cluster.names import CONTROLLER, part_names
from tests.cluster.deployment import MAVERICK, NAMESPACE, SharedRay, actor, pid_of, replica_pids
from tests.cluster.steady_load import LENGTH, TOKENS, SteadyLoad
from tests.processes import wait_until
from tests.reference import Reference

CHANGE_S = 150.0
BEGUN_WITH = ["router-0", "shard-0", "shard-1"]


@pytest.fixture(scope="module")
def reference(reference_of: Callable[[str], Reference]) -> Reference:
    return reference_of(MAVERICK[0])


@pytest.fixture(scope="module")
def deployment(shared_ray: SharedRay, reference: Reference) -> Deployment:
    return shared_ray.serve(reference.directory, **MAVERICK[1])


@pytest.fixture
def controller(deployment: Deployment) -> ControllerClient:
    assert deployment
    return ControllerClient(NAMESPACE)


@pytest.fixture
def load(deployment: Deployment, reference: Reference) -> Iterator[SteadyLoad]:
    """Streams all the time. At the end every one has had the reference's tokens."""
    with Client(deployment.address) as client, SteadyLoad(client) as load:
        yield load
    assert load.answers
    assert load.answers == [reference.greedy(TOKENS, LENGTH)[0]] * len(load.answers)


def wait_for(controller: ControllerClient, operation_id: str) -> str:
    """How the operation has ended."""

    def has_ended() -> bool:
        status = controller.operation(operation_id)
        return status is not None and status.has_ended

    wait_until(has_ended, CHANGE_S)
    status = controller.operation(operation_id)
    assert status is not None
    return status.phase


def kill(name: str) -> None:
    os.kill(pid_of(name), signal.SIGKILL)


def test_what_cannot_work_is_refused_with_its_number(controller: ControllerClient) -> None:
    with pytest.raises(DroverError, match=r"1 shard holds 1 \* 64 experts of a layer .* the model has 128"):
        controller.resize("too-few", shards=1)
    with pytest.raises(DroverError, match=r"no other node has room for router-\d+, which needs 0.5 CPU"):
        controller.resize("too-many", routers=9)
    assert part_names(NAMESPACE) == BEGUN_WITH


def test_shards_come_and_go_although_the_controller_and_a_new_shard_die(
    load: SteadyLoad, controller: ControllerClient
) -> None:
    controller.resize("up", shards=3)
    wait_until(lambda: "shard-2" in part_names(NAMESPACE), CHANGE_S)
    kill("shard-2")
    kill(CONTROLLER)
    assert wait_for(controller, "up") == "done"
    assert part_names(NAMESPACE) == [*BEGUN_WITH, "shard-2"]
    assert controller.stats().slots["shard-2"] > 0
    load.wait_for_more()
    controller.resize("down", shards=2)
    kill("shard-0")
    assert wait_for(controller, "down") == "done"
    assert part_names(NAMESPACE) == BEGUN_WITH
    load.wait_for_more()


def test_routers_come_and_go_although_one_dies(load: SteadyLoad, controller: ControllerClient) -> None:
    controller.resize("two", routers=2)
    assert wait_for(controller, "two") == "done"
    wait_until(lambda: open_requests("router-1") > 0, CHANGE_S)
    kill("router-1")
    controller.resize("one", routers=1)
    assert wait_for(controller, "one") == "done"
    assert part_names(NAMESPACE) == BEGUN_WITH
    load.wait_for_more()


def test_frontends_come_and_go(load: SteadyLoad, controller: ControllerClient) -> None:
    controller.resize("both", frontends=2)
    assert wait_for(controller, "both") == "done"
    assert len(replica_pids()) == 2
    load.wait_for_more()
    controller.resize("first", frontends=1)
    assert wait_for(controller, "first") == "done"
    wait_until(lambda: len(replica_pids()) == 1)


def open_requests(router: str) -> int:
    import ray

    stats = ray.get(actor(router).stats.remote())
    return int(stats.open_requests)

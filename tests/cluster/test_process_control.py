"""What the controller does for a deployment, and that nobody who computes tokens waits for it."""

import os
import signal
from collections.abc import Callable, Iterator

import pytest
import ray

from checkpoint.errors import DroverError
from client import Client
from cluster.actors.wanted_slots import wanted_slots
from cluster.controller_client import ControllerClient
from cluster.launch import Deployment
from cluster.names import CONTROLLER
from tests.cluster.deployment import MAVERICK, NAMESPACE, SharedRay, actor, pid_of
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
    with Client(deployment.address) as client:
        yield client
        wait_until(lambda: client.health(INFERENCE) == "SERVING", RESTART_S)


@pytest.fixture
def controller(deployment: Deployment) -> ControllerClient:
    assert deployment
    return ControllerClient(NAMESPACE)


def test_what_nobody_stands_in_for_is_not_drained(controller: ControllerClient) -> None:
    with pytest.raises(DroverError, match="router-0 is the last router that serves; "):
        controller.drain("router-0", 1.0)
    with pytest.raises(DroverError, match="shard-1 is the only shard that serves experts 64-127 of layer "):
        controller.drain("shard-1", 1.0)
    with pytest.raises(DroverError, match="no other node has room for router-0, which needs "):
        controller.drain(ray.util.get_node_ip_address(), 1.0)
    with pytest.raises(DroverError, match="shard-7 is neither a part nor a node; parts are router-0, shard-0, shard-1"):
        controller.drain("shard-7", 1.0)
    with pytest.raises(DroverError, match="shard-1 is not drained"):
        controller.undo_drain("shard-1")
    stats = controller.stats()
    assert (stats.drained, stats.cleared) == ({}, {})


def test_streams_do_not_notice_the_controllers_death(
    client: Client, controller: ControllerClient, reference: Reference
) -> None:
    pid = pid_of(CONTROLLER)
    stream = client.generate(TOKENS, max_tokens=400, temperature=0, timeout_s=PATIENCE_S)
    token_ids = list(next(stream).token_ids)
    os.kill(pid, signal.SIGKILL)
    token_ids += [token_id for delta in stream for token_id in delta.token_ids]
    assert token_ids == reference.greedy(TOKENS, 400)[0]
    with pytest.raises(DroverError, match="is the only shard"):  # it is there again, and knows what it is for
        controller.drain("shard-0", 1.0)
    assert pid_of(CONTROLLER) != pid


def test_a_part_that_ray_gave_up_is_created_anew(client: Client, controller: ControllerClient) -> None:
    assert controller.stats()  # it watches
    pid = pid_of("shard-0")
    ray.kill(actor("shard-0"), no_restart=True)
    wait_until(lambda: client.health(INFERENCE) == "NOT_SERVING", RESTART_S)
    wait_until(lambda: client.health(INFERENCE) == "SERVING", RESTART_S)
    assert pid_of("shard-0") != pid
    stream = client.generate(TOKENS, max_tokens=4, temperature=0, timeout_s=PATIENCE_S)
    assert sum(len(delta.token_ids) for delta in stream) == 4


@pytest.mark.parametrize("asked", [CONTROLLER, "router-0"])
def test_what_a_shard_holds_is_known_to_the_controller_and_to_routers(asked: str, deployment: Deployment) -> None:
    assert deployment
    slots = ray.get(actor(asked).slots_of.remote("shard-1"), timeout=PATIENCE_S)
    assert sorted({expert for _, expert in slots}) == list(range(64, 128))


def test_a_shard_that_finds_nobody_to_ask_knows_that(deployment: Deployment) -> None:
    assert deployment
    assert wanted_slots("shard-0", "nowhere", ["router-0"]) is None

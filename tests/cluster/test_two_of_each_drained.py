"""Routers and shards are drained amid streams; nobody who computes tokens waits for the controller."""

import os
import signal
from collections.abc import Callable, Iterator

import pytest
import ray

from checkpoint.errors import DroverError
from client import Client
from cluster.controller_client import ControllerClient
from cluster.launch import Deployment
from cluster.names import CONTROLLER, part_names
from cluster.status import as_json, read_status
from tests.cluster.deployment import NAMESPACE, actor, pid_of
from tests.cluster.steady_load import TOKENS, SteadyLoad
from tests.cluster.two_of_each import RESTART_S, ROUTERS, is_ready, is_well, stats_of
from tests.command import drover_process
from tests.processes import PATIENCE_S, wait_until
from tests.reference import Reference

INFERENCE = "drover.v1.Inference"
MANY = 400
STREAMS = 6
PARTS = (*ROUTERS, "shard-0", "shard-1")
FLAGS = ("--namespace", NAMESPACE)


@pytest.fixture
def client(two_of_each: Deployment) -> Iterator[Client]:
    with Client(two_of_each.address) as client:
        yield client
        wait_until(lambda: client.health(INFERENCE) == "SERVING", RESTART_S)


@pytest.fixture
def controller(two_of_each: Deployment) -> Iterator[ControllerClient]:
    """Afterwards nothing may be drained, and all parts are there and linked."""
    assert two_of_each
    yield ControllerClient(NAMESPACE)
    stats = ControllerClient(NAMESPACE).stats()
    assert (stats.drained, stats.cleared) == ({}, {})
    wait_until(lambda: part_names(NAMESPACE) == list(PARTS), RESTART_S)
    for name in ROUTERS:
        wait_until(lambda name=name: is_well(name), RESTART_S)


def begin(client: Client) -> Callable[[], list[int]]:
    """A stream that has begun; the function reads it to its end."""
    stream = client.generate(TOKENS, max_tokens=MANY, temperature=0, timeout_s=PATIENCE_S)
    token_ids = list(next(stream).token_ids)
    return lambda: token_ids + [token_id for delta in stream for token_id in delta.token_ids]


def refusal(drain: Callable[[], None]) -> str:
    with pytest.raises(DroverError) as refused:
        drain()
    return str(refused.value)


def test_what_cannot_go_is_refused_with_the_reason(controller: ControllerClient) -> None:
    address = ray.util.get_node_ip_address()
    assert "no other node has room for router-0, which needs " in refusal(lambda: controller.drain(address, 1.0))
    unknown = refusal(lambda: controller.drain("shard-7", 1.0))
    assert f"shard-7 is neither a part nor a node; parts are {', '.join(PARTS)}; nodes are " in unknown
    assert "shard-1 is not drained" in refusal(lambda: controller.undo_drain("shard-1"))


def test_a_drained_shard_goes_amid_streams_stays_away_and_comes_back(
    client: Client, controller: ControllerClient, reference: Reference
) -> None:
    read_rest = begin(client)
    drained = drover_process("drain", "shard-1", *FLAGS)
    assert (drained.returncode, drained.stdout) == (0, "shard-1 is drained\n"), drained.stderr
    assert read_rest() == reference.greedy(TOKENS, MANY)[0]
    assert part_names(NAMESPACE) == [*ROUTERS, "shard-0"]
    controller.drain("shard-1", 1.0)  # again: it is so already
    assert controller.drain_progress("shard-1").is_done
    assert "shard-0 is the only shard that serves experts 0-127 of layer " in refusal(
        lambda: controller.drain("shard-0", 1.0)
    )
    for name in (CONTROLLER, "router-1"):  # the drain is not forgotten, and nobody waits for the shard
        os.kill(pid_of(name), signal.SIGKILL)
    wait_until(lambda: is_ready("router-1"), RESTART_S)
    assert controller.stats().drained == {"shard-1": 1.0}
    status = as_json(read_status(NAMESPACE))
    assert {shard["name"]: shard["phase"] for shard in status["shards"]} == {"shard-0": "ready", "shard-1": "drained"}
    assert client.health(INFERENCE) == "SERVING"

    undone = drover_process("drain", "--undo", "shard-1", *FLAGS)
    assert undone.returncode == 0, undone.stderr


@pytest.mark.parametrize("grace_s", [0.0, 30.0], ids=["moved", "finished"])
def test_a_drained_router_goes_and_its_streams_do_not_notice(
    grace_s: float, client: Client, controller: ControllerClient, reference: Reference
) -> None:
    """They finish there, or go on at the other one."""
    taken_over = replayed("router-0")
    wait_until(lambda: all(stats_of(name).life_lines == 2 for name in ROUTERS))  # both frontends use both
    try:
        with SteadyLoad(client, MANY, STREAMS) as load:
            wait_until(lambda: all(stats_of(name).open_requests for name in ROUTERS))
            controller.drain("router-1", grace_s)
            wait_until(lambda: controller.drain_progress("router-1").is_done)
        assert load.answers == [reference.greedy(TOKENS, MANY)[0]] * len(load.answers)
        assert "router-1" not in part_names(NAMESPACE)
        assert (replayed("router-0") > taken_over) == (grace_s == 0.0)
        assert "router-0 is the last router that serves; " in refusal(lambda: controller.drain("router-0", 1.0))
        assert begin(client)() == reference.greedy(TOKENS, MANY)[0]
    finally:
        controller.undo_drain("router-1")


def replayed(name: str) -> int:
    engine = stats_of(name).engine
    assert engine is not None
    return engine.replayed


def test_streams_do_not_notice_the_controllers_death(
    client: Client, controller: ControllerClient, reference: Reference
) -> None:
    pid = pid_of(CONTROLLER)
    read_rest = begin(client)
    os.kill(pid, signal.SIGKILL)
    assert read_rest() == reference.greedy(TOKENS, MANY)[0]
    assert controller.stats().parts == PARTS  # it is there again
    assert pid_of(CONTROLLER) != pid


def test_a_part_that_ray_gave_up_is_created_anew(
    client: Client, controller: ControllerClient, reference: Reference
) -> None:
    assert controller.stats()  # it watches
    pid = pid_of("shard-0")
    read_rest = begin(client)
    ray.kill(actor("shard-0"), no_restart=True)
    assert read_rest() == reference.greedy(TOKENS, MANY)[0]
    wait_until(lambda: "shard-0" in part_names(NAMESPACE), RESTART_S)
    assert pid_of("shard-0") != pid


@pytest.mark.parametrize("asked", [CONTROLLER, "router-0"])
def test_what_a_shard_holds_is_known_to_the_controller_and_to_routers(asked: str, two_of_each: Deployment) -> None:
    assert two_of_each
    slots = ray.get(actor(asked).slots_of.remote("shard-1"), timeout=PATIENCE_S).slots
    assert sorted({expert for _, expert in slots}) == list(range(128))

"""A real deployment as its operators see it: Admin over gRPC, the commands, and what has happened."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.controller_client import ControllerClient
from cluster.launch import Deployment
from cluster.names import CONTROLLER
from cluster.reports import AdminView
from protos.drover.v1 import admin_pb2 as pb
from protos.drover.v1 import admin_pb2_grpc
from tests.cluster.deployment import MAVERICK, NAMESPACE, SharedRay, pid_of
from tests.command import drover_process
from tests.loopback import failure_of
from tests.processes import PATIENCE_S, wait_until
from tests.reference import Reference

RESTART_S = 120.0


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


def texts(controller: ControllerClient, subject: str, after: int = 0) -> list[str]:
    return [event.text for event in controller.events_after(after) if event.subject == subject]


def admin_of(controller: ControllerClient) -> AdminView:
    def view() -> AdminView:
        admin = controller.stats().admin
        assert admin is not None
        return admin

    wait_until(lambda: view().problem == "")
    return view()


class Admin:
    """Calls of the Admin service, with the token of its file."""

    def __init__(self, view: AdminView, channel: grpc.Channel) -> None:
        self._stub: Any = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
        self._metadata = [("authorization", f"Bearer {Path(view.token_file).read_text().strip()}")]

    def __getattr__(self, method: str) -> Any:
        return lambda request: getattr(self._stub, method)(request, timeout=RESTART_S, metadata=self._metadata)


@pytest.fixture
def admin(controller: ControllerClient) -> Iterator[Admin]:
    view = admin_of(controller)
    with grpc.insecure_channel(view.address) as channel:
        yield Admin(view, channel)


def test_admin_tells_how_the_deployment_is_and_lets_no_stranger_in(admin: Admin, controller: ControllerClient) -> None:
    status = admin.GetStatus(pb.GetStatusRequest())
    assert {part.name: part.phase for part in (*status.routers, *status.shards)} == {
        "router-0": "ready", "shard-0": "ready", "shard-1": "ready"
    }  # fmt: skip
    assert all(part.experts_held == part.experts_wanted > 0 for part in status.shards)
    assert {tuple(layer.copies) for layer in status.layers} == {(1,) * 128}
    with grpc.insecure_channel(admin_of(controller).address) as channel:
        stub: Any = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
        error: Any = failure_of(lambda: stub.GetStatus(pb.GetStatusRequest(), timeout=PATIENCE_S))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED


def test_what_cannot_work_is_refused_alike_by_admin_and_command(admin: Admin) -> None:
    error: Any = failure_of(lambda: admin.Drain(pb.DrainRequest(target="shard-1")))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert error.details().startswith("shard-1 is the only shard that serves experts ")
    refused = drover_process("drain", "shard-1", "--namespace", NAMESPACE)
    assert (refused.returncode, refused.stderr) == (1, f"drover: error: {error.details()}\n")


def test_what_dies_is_told_and_not_forgotten(admin: Admin, controller: ControllerClient) -> None:
    wait_until(lambda: "looks after 3 parts" in texts(controller, CONTROLLER))
    number = controller.events_after(0)[-1].number
    following = admin.Events(pb.EventsRequest(after=number, follow=True))
    os.kill(pid_of("shard-1"), signal.SIGKILL)
    wait_until(lambda: "is ready" in texts(controller, "shard-1", number), RESTART_S)
    assert texts(controller, "shard-1", number)[0].startswith("died; Ray ")
    assert next(event for event in following if event.subject == "shard-1").text.startswith("died; Ray ")
    following.cancel()

    told = texts(controller, "shard-1")
    token_file = admin_of(controller).token_file
    looked = texts(controller, CONTROLLER).count("looks after 3 parts")
    os.kill(pid_of(CONTROLLER), signal.SIGKILL)
    wait_until(lambda: texts(controller, CONTROLLER).count("looks after 3 parts") > looked, RESTART_S)
    assert texts(controller, "shard-1")[: len(told)] == told
    shown = drover_process("events", "--json", "--last", "256", "--namespace", NAMESPACE)
    events = [json.loads(line) for line in shown.stdout.splitlines()]
    assert [event["text"] for event in events if event["subject"] == "shard-1"] == texts(controller, "shard-1")
    view = admin_of(controller)
    assert view.token_file == token_file
    with grpc.insecure_channel(view.address) as channel:
        assert len(Admin(view, channel).GetStatus(pb.GetStatusRequest()).shards) == 2

"""drover.v1.Admin over real gRPC on loopback: who is let in, what is refused, and what is told."""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.admin.server import MAX_CALLS, AdminServer, AdminSettings
from cluster.admin.service import AdminService
from cluster.reports import ActorState, DrainProgress, LoadView, OperationStatus, Phase, RebalanceReport, ShardStats
from cluster.status import DeploymentStatus, PartStatus, as_json
from protos.drover.v1 import admin_pb2 as pb
from protos.drover.v1 import admin_pb2_grpc
from tests.cluster.small_controller import SmallController
from tests.loopback import failure_of
from tests.processes import PATIENCE_S, wait_until

TOKEN = "a-token-that-nobody-guesses"


@pytest.fixture
def controller() -> SmallController:
    return SmallController()


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.touch(0o600)
    path.write_text(TOKEN + "\n")
    return path


@pytest.fixture
def server(controller: SmallController, token_file: Path) -> Iterator[AdminServer]:
    def status() -> dict[str, Any]:
        ready = ActorState(7, Phase.READY, 1, 1)
        parts = [PartStatus("shard-0", ready, ShardStats(60, 0, ()), "", "10.0.0.1", 2)]
        return as_json(DeploymentStatus(parts, controller.stats(), LoadView(0.5, {1: [2.0, 8.0]}, {1: [1, 2]})))

    server = AdminServer(AdminService(controller, status), "drover-test", AdminSettings(token_file=token_file))
    wait_until(lambda: server.view.problem == "")
    yield server
    server.close()


class Bearer:
    """A stub whose calls have a deadline and metadata."""

    def __init__(self, channel: grpc.Channel, *metadata: tuple[str, str]) -> None:
        self._stub: Any = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
        self._metadata = metadata

    def __getattr__(self, method: str) -> Any:
        return lambda request: getattr(self._stub, method)(request, timeout=PATIENCE_S, metadata=self._metadata)


@pytest.fixture
def channel(server: AdminServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.view.address) as channel:
        yield channel


@pytest.fixture
def admin(channel: grpc.Channel) -> Bearer:
    return Bearer(channel, ("authorization", f"Bearer {TOKEN}"))


def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    error: Any = failure_of(call)
    return error.code(), error.details()


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", TOKEN)],
        [("authorization", "Bearer ")],
        [("authorization", f"Bearer {TOKEN}x")],
        [("authorization", "Bearer other"), ("authorization", f"Bearer {TOKEN}")],
    ],
)
def test_nobody_is_let_in_without_the_token(
    metadata: list[tuple[str, str]], channel: grpc.Channel, controller: SmallController, token_file: Path
) -> None:
    stranger = Bearer(channel, *metadata)
    code, message = refusal(lambda: stranger.Resize(pb.ResizeRequest(shards=3)))
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert str(token_file) in message
    assert TOKEN not in message
    assert refusal(lambda: list(stranger.Events(pb.EventsRequest())))[0] is grpc.StatusCode.UNAUTHENTICATED
    assert controller.asked == []


def test_strangers_who_never_send_their_request_keep_nobody_out(admin: Bearer, channel: grpc.Channel) -> None:
    silent = threading.Event()

    def nothing() -> Iterator[bytes]:
        silent.wait(PATIENCE_S)
        yield from ()

    half_open = channel.stream_unary("/drover.v1.Admin/GetStatus", None, None)  # type: ignore[arg-type]
    calls = [half_open.future(nothing(), timeout=PATIENCE_S) for _ in range(MAX_CALLS)]
    try:
        assert {call.code() for call in calls} == {grpc.StatusCode.UNAUTHENTICATED}
        assert admin.GetStatus(pb.GetStatusRequest()).autoscaling == "on"
    finally:
        silent.set()


def test_a_resize_is_begun_and_named(admin: Bearer, controller: SmallController) -> None:
    begun = admin.Resize(pb.ResizeRequest(operation_id="nightly", shards=3, routers=2, replicas=2, frontends=4))
    assert controller.asked == [("resize", "nightly", 3, 2, 2, 4)]
    assert (begun.operation_id, begun.phase, begun.text, begun.step, begun.steps) == (
        "nightly", "prepare", "3 shards", 1, 2
    )  # fmt: skip
    unnamed = admin.Resize(pb.ResizeRequest(shards=3)).operation_id
    assert unnamed.startswith("resize-")
    assert unnamed != admin.Resize(pb.ResizeRequest(shards=3)).operation_id


@pytest.mark.parametrize(
    ("method", "request_", "message"),
    [
        ("Resize", pb.ResizeRequest(), "shards: is not set, and nor is another of shards, routers, frontends, repl"),
        ("Resize", pb.ResizeRequest(shards=0), "shards: is 0; it must be from 1 to 4096"),
        ("Resize", pb.ResizeRequest(routers=5000), "routers: is 5000; it must be from 1 to 4096"),
        ("Resize", pb.ResizeRequest(operation_id="a b", shards=1), "operation_id: is 'a b'; it must have from 1 to 64"),
        ("Drain", pb.DrainRequest(), "target: is '', which is neither a part's name nor a node's"),
        ("Drain", pb.DrainRequest(target="shard-1", grace_s=-1), "grace_s: is -1; it must be from 0 to 86400"),
        ("Drain", pb.DrainRequest(target="shard-1", grace_s=float("nan")), "grace_s: is nan; it must be from 0"),
        ("Undrain", pb.UndrainRequest(target="../x"), "target: is '../x', which is neither"),
        ("GetOperation", pb.GetOperationRequest(), "operation_id: is ''; it must have"),
        ("Abort", pb.AbortRequest(), "operation_id: is ''; it must have"),
    ],
)
def test_a_wrong_field_is_named(
    method: str, request_: Any, message: str, admin: Bearer, controller: SmallController
) -> None:
    code, details = refusal(lambda: getattr(admin, method)(request_))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith(message)
    assert controller.asked == []


def test_what_cannot_work_is_refused_in_the_controllers_words(admin: Bearer, controller: SmallController) -> None:
    controller.refusal = "3 shards hold 3 * 40 experts per layer, the model has 128; ask for 4 or more"
    for call in (
        lambda: admin.Resize(pb.ResizeRequest(shards=3)),
        lambda: admin.Drain(pb.DrainRequest(target="shard-1")),
        lambda: admin.Undrain(pb.UndrainRequest(target="shard-1")),
    ):
        assert refusal(call) == (grpc.StatusCode.FAILED_PRECONDITION, controller.refusal)
    controller.report = RebalanceReport(refusal="no load was measured in the last 30 s")
    assert refusal(lambda: admin.Rebalance(pb.RebalanceRequest())) == (
        grpc.StatusCode.FAILED_PRECONDITION, controller.report.refusal
    )  # fmt: skip


def test_a_dry_run_tells_its_numbers_and_begins_nothing(admin: Bearer, controller: SmallController) -> None:
    moves = ("expert 3 of layer 1 gets a copy on shard-0",)
    controller.report = RebalanceReport("", "", 2.5, 1.25, 4096, 12.5, True, "12.5 tok/s are worth 4 KiB", moves)
    told = admin.Rebalance(pb.RebalanceRequest(dry_run=True))
    assert not told.HasField("operation_id")
    assert (told.imbalance_before, told.imbalance_after, told.moved_bytes, told.gain_tokens_per_s) == (
        2.5, 1.25, 4096, 12.5
    )  # fmt: skip
    assert (told.is_accepted, told.reason, tuple(told.moves)) == (True, "12.5 tok/s are worth 4 KiB", moves)
    assert controller.running is None
    assert admin.Rebalance(pb.RebalanceRequest(operation_id="now")).operation_id == "now"
    assert admin.GetOperation(pb.GetOperationRequest(operation_id="now")).kind == "rebalance"


def test_a_drain_is_told_with_what_is_left(admin: Bearer, controller: SmallController) -> None:
    controller.progress = DrainProgress(False, {"router-0": "finishes its requests, for 9 s more at most"})
    told = admin.Drain(pb.DrainRequest(target="router-0"))
    assert (told.is_done, dict(told.left)) == (False, controller.progress.left)
    admin.Drain(pb.DrainRequest(target="router-0", grace_s=0))
    admin.Undrain(pb.UndrainRequest(target="router-0"))
    assert controller.asked == [("drain", "router-0", 30.0), ("drain", "router-0", 0.0), ("undo_drain", "router-0")]


def test_an_operation_is_known_while_it_runs_and_afterwards(admin: Bearer, controller: SmallController) -> None:
    ask = pb.GetOperationRequest(operation_id="resize-1")
    code, message = refusal(lambda: admin.GetOperation(ask))
    assert (code, message) == (
        grpc.StatusCode.NOT_FOUND,
        "no operation resize-1 is known; Events tells the newest ones",
    )
    admin.Resize(pb.ResizeRequest(operation_id="resize-1", shards=3))
    assert admin.GetOperation(ask).phase == "prepare"
    admin.Abort(pb.AbortRequest(operation_id="resize-1"))
    ended = admin.GetOperation(ask)
    assert (ended.phase, ended.reason) == ("aborted", "an operator has aborted it")
    assert refusal(lambda: admin.Abort(pb.AbortRequest(operation_id="resize-1"))) == (
        grpc.StatusCode.FAILED_PRECONDITION, "resize-1 does not run"
    )  # fmt: skip


def test_autoscaling_is_paused_and_resumed(admin: Bearer, controller: SmallController) -> None:
    admin.PauseAutoscaling(pb.PauseAutoscalingRequest())
    admin.ResumeAutoscaling(pb.ResumeAutoscalingRequest())
    assert controller.asked == [("pause_autoscaling", True), ("pause_autoscaling", False)]


def test_status_tells_parts_loads_and_what_changes(admin: Bearer, controller: SmallController) -> None:
    assert not admin.GetStatus(pb.GetStatusRequest()).HasField("operation")
    controller.running = OperationStatus("resize-1", "resize", "commit", "3 shards", 1, 2)
    status = admin.GetStatus(pb.GetStatusRequest())
    [shard] = [part for part in status.shards if part.name == "shard-0"]
    assert (shard.phase, shard.node, shard.restarts, shard.experts_held, shard.experts_wanted) == (
        "ready", "10.0.0.1", 2, 60, 64
    )  # fmt: skip
    assert [(part.name, part.phase) for part in status.routers] == [("router-0", "starting")]
    assert (status.operation.operation_id, status.operation.phase, status.autoscaling) == ("resize-1", "commit", "on")
    assert [(row.layer, list(row.load), list(row.copies)) for row in status.layers] == [(1, [2.0, 8.0], [1, 2])]


def test_events_are_told_once_and_followed(admin: Bearer, controller: SmallController) -> None:
    controller.events.add("part", "shard-1", "died", restarts=2)
    [event] = admin.Events(pb.EventsRequest())
    assert (event.kind, event.subject, event.text) == ("part", "shard-1", "died")
    assert json.loads(event.data_json) == {"restarts": 2}
    following = admin.Events(pb.EventsRequest(after=event.number, follow=True))
    controller.events.add("part", "shard-1", "is ready")
    assert next(following).text == "is ready"
    controller.events.add("part", "shard-0", "died")
    assert next(following).subject == "shard-0"
    following.cancel()


def test_calls_and_their_sizes_are_bounded(admin: Bearer, controller: SmallController) -> None:
    controller.events.add("part", "shard-1", "died")
    followers = [admin.Events(pb.EventsRequest(follow=True)) for _ in range(MAX_CALLS)]
    assert [next(follower).text for follower in followers] == ["died"] * MAX_CALLS
    code, _ = refusal(lambda: admin.GetStatus(pb.GetStatusRequest()))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    for follower in followers:
        follower.cancel()
    wait_until(lambda: is_let_in(admin))
    code, _ = refusal(lambda: admin.Drain(pb.DrainRequest(target="x" * 2**17)))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


def is_let_in(admin: Bearer) -> bool:
    try:
        admin.GetOperation(pb.GetOperationRequest(operation_id="none"))
    except grpc.RpcError as error:
        return bool(error.code() is grpc.StatusCode.NOT_FOUND)  # type: ignore[attr-defined]
    return True


def test_a_port_that_is_taken_or_a_file_that_is_wrong_is_a_problem_and_tried_again(
    server: AdminServer, controller: SmallController, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.admin.server.RETRY_S", 0.01)
    port = int(server.view.address.rpartition(":")[2])
    service = AdminService(controller, dict)
    second = AdminServer(service, "drover-test", AdminSettings(port=port, token_file=token_file))
    try:
        wait_until(lambda: "is the port taken" in second.view.problem)
        os.chmod(token_file, 0o644)
        wait_until(lambda: second.view.problem.endswith(f"can be read by others; chmod 600 {token_file}"))
        os.chmod(token_file, 0o600)
        server.close()
        wait_until(lambda: second.view.problem == "")
        assert second.view.address == server.view.address
    finally:
        second.close()

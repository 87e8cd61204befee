"""drover.v1.Admin: protobuf to and from what the controller does. Knows neither gRPC's servers nor Ray."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol, TypeVar

from checkpoint.errors import DroverError, quoted
from cluster.addresses import OPERATION_ID, TARGET, new_operation_id
from cluster.events import KEPT, Event
from cluster.reports import ControllerStats, DrainProgress, OperationStatus, RebalanceReport
from protos.drover.v1 import admin_pb2 as pb
from router.errors import DeadlineExceeded, InvalidArgument, NotFound

MAX_PARTS = 4096
GRACE_S, MAX_GRACE_S = 30.0, 86_400.0
ANSWER_S = 30.0
THREADS = 8
FOLLOW_S = 0.2  # how often a follower looks for events
COUNTS = ("shards", "routers", "frontends", "replicas")
_Answer = TypeVar("_Answer")


class Operations(Protocol):
    """What the controller does for its operators. Refusals are sentences; an empty one is none."""

    def resize(
        self,
        operation_id: str,
        shards: int | None = None,
        routers: int | None = None,
        replicas: int | None = None,
        frontends: int | None = None,
    ) -> str: ...

    def rebalance(self, operation_id: str, is_dry_run: bool) -> RebalanceReport: ...

    def drain(self, target: str, grace_s: float) -> str: ...

    def undo_drain(self, target: str) -> str: ...

    def drain_progress(self, target: str) -> DrainProgress: ...

    def operation(self, operation_id: str) -> OperationStatus | None: ...

    def abort(self, operation_id: str) -> str: ...

    def pause_autoscaling(self, is_paused: bool) -> str: ...

    def stats(self) -> ControllerStats: ...

    def events_after(self, number: int, limit: int) -> list[Event]: ...


class AdminService:
    """The service's methods, under the names that admin.proto gives them."""

    def __init__(self, operations: Operations, read_status: Callable[[], dict[str, Any]]) -> None:
        """read_status: the deployment as cluster.status.as_json tells it."""
        self._operations, self._read_status = operations, read_status
        self._threads = ThreadPoolExecutor(THREADS, "admin")  # the controller's methods block

    async def Resize(self, request: pb.ResizeRequest) -> pb.Operation:
        """Begin to change the numbers of parts."""
        operation_id = _operation_id(request.operation_id, "resize")
        counts = {name: getattr(request, name) for name in COUNTS if request.HasField(name)}
        if not counts:
            raise InvalidArgument("shards", f"is not set, and nor is another of {', '.join(COUNTS)}; set one")
        for name, count in counts.items():
            if not 1 <= count <= MAX_PARTS:
                raise InvalidArgument(name, f"is {count}; it must be from 1 to {MAX_PARTS}")
        _obey(await self._run(partial(self._operations.resize, operation_id, **counts)))
        found = await self._run(self._operations.operation, operation_id)
        return _operation(found or OperationStatus(operation_id, "resize", "scale"))

    async def Rebalance(self, request: pb.RebalanceRequest) -> pb.RebalanceResponse:
        """Begin to place experts anew, or tell what that would do."""
        operation_id = _operation_id(request.operation_id, "rebalance")
        report = await self._run(self._operations.rebalance, operation_id, request.dry_run)
        _obey(report.refusal)
        return pb.RebalanceResponse(
            operation_id=report.operation_id or None,
            imbalance_before=report.imbalance_before,
            imbalance_after=report.imbalance_after,
            moved_bytes=report.moved_bytes,
            gain_tokens_per_s=report.gain_tok_s,
            is_accepted=report.is_accepted,
            reason=report.reason,
            moves=report.moves,
        )

    async def Drain(self, request: pb.DrainRequest) -> pb.DrainResponse:
        """Take a part out of service, and tell how far that is."""
        target, grace_s = _target(request.target), request.grace_s if request.HasField("grace_s") else GRACE_S
        if not 0 <= grace_s <= MAX_GRACE_S:
            raise InvalidArgument("grace_s", f"is {grace_s:g}; it must be from 0 to {MAX_GRACE_S:g}")
        _obey(await self._run(self._operations.drain, target, grace_s))
        progress = await self._run(self._operations.drain_progress, target)
        return pb.DrainResponse(is_done=progress.is_done, left=progress.left)

    async def Undrain(self, request: pb.UndrainRequest) -> pb.UndrainResponse:
        """Want a part again."""
        _obey(await self._run(self._operations.undo_drain, _target(request.target)))
        return pb.UndrainResponse()

    async def GetOperation(self, request: pb.GetOperationRequest) -> pb.Operation:
        """How an operation is, or has ended."""
        operation_id = _operation_id(request.operation_id)
        found = await self._run(self._operations.operation, operation_id)
        if found is None:
            raise NotFound(f"no operation {operation_id} is known; Events tells the newest ones")
        return _operation(found)

    async def Abort(self, request: pb.AbortRequest) -> pb.AbortResponse:
        """End an operation."""
        _obey(await self._run(self._operations.abort, _operation_id(request.operation_id)))
        return pb.AbortResponse()

    async def PauseAutoscaling(self, request: pb.PauseAutoscalingRequest) -> pb.PauseAutoscalingResponse:
        """Scale nothing from now on."""
        _obey(await self._run(self._operations.pause_autoscaling, True))
        return pb.PauseAutoscalingResponse()

    async def ResumeAutoscaling(self, request: pb.ResumeAutoscalingRequest) -> pb.ResumeAutoscalingResponse:
        """Scale again."""
        _obey(await self._run(self._operations.pause_autoscaling, False))
        return pb.ResumeAutoscalingResponse()

    async def GetStatus(self, request: pb.GetStatusRequest) -> pb.Status:
        """The deployment as it is now."""
        status = await self._run(self._read_status)
        controller = status["controller"] or {}
        running = controller.get("operation")
        return pb.Status(
            routers=[_part(part) for part in status["routers"]],
            shards=[_part(part) for part in status["shards"]],
            operation=_operation(OperationStatus(**running)) if running else None,
            autoscaling=controller.get("autoscaling", ""),
            layers=[pb.LayerLoad(**layer) for layer in (status["load"] or {"layers": []})["layers"]],
            problems=controller.get("problems", {}),
        )

    async def Events(self, request: pb.EventsRequest) -> AsyncGenerator[pb.Event, None]:
        """What has happened, and what happens."""
        number = request.after
        while True:
            for event in self._operations.events_after(number, KEPT):
                number = event.number
                yield _event(event)
            if not request.follow:
                return
            await asyncio.sleep(FOLLOW_S)

    async def _run(self, method: Callable[..., _Answer], *arguments: Any) -> _Answer:
        running = asyncio.get_running_loop().run_in_executor(self._threads, partial(method, *arguments))
        try:
            return await asyncio.wait_for(running, ANSWER_S)
        except asyncio.TimeoutError:
            raise DeadlineExceeded(f"the controller did not answer within {ANSWER_S:g} s") from None


def _obey(refusal: str) -> None:
    if refusal:
        raise DroverError(refusal)


def _operation_id(given: str, kind: str = "") -> str:
    if not given and kind:
        return new_operation_id(kind)
    if not re.fullmatch(OPERATION_ID, given):
        raise InvalidArgument(
            "operation_id", f"is {quoted(given)}; it must have from 1 to 64 letters, digits, '-', '_' and '.'"
        )
    return given


def _target(given: str) -> str:
    if not re.fullmatch(TARGET, given):
        raise InvalidArgument("target", f"is {quoted(given)}, which is neither a part's name nor a node's")
    return given


def _operation(status: OperationStatus) -> pb.Operation:
    return pb.Operation(
        operation_id=status.operation_id,
        kind=status.kind,
        phase=status.phase,
        text=status.text,
        step=status.step,
        steps=status.steps,
        waits_for=status.waits_for,
        moved_bytes=status.moved_bytes,
        total_bytes=status.total_bytes,
        reason=status.reason,
    )


def _part(part: dict[str, Any]) -> pb.Part:
    engine = part.get("engine") or {}
    return pb.Part(
        name=part["name"],
        phase=part["phase"],
        node=part.get("node", ""),
        error=part["error"],
        restarts=part.get("restarts", 0),
        running=engine.get("running", 0),
        waiting=engine.get("waiting", 0),
        tokens_per_s=part.get("tokens_per_s", 0.0),
        experts_held=part.get("experts_held", 0),
        experts_wanted=part.get("experts_wanted", 0),
    )


def _event(event: Event) -> pb.Event:
    return pb.Event(
        number=event.number,
        time_s=event.time_s,
        kind=event.kind,
        subject=event.subject,
        text=event.text,
        data_json=json.dumps(event.data),
    )

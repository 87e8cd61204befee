"""A controller without a deployment: what operators ask for is noted, and nothing is changed."""

from dataclasses import dataclass, field, replace

from cluster.events import Event, EventLog
from cluster.reports import ControllerStats, DrainProgress, OperationStatus, RebalanceReport

PARTS = ("router-0", "shard-0", "shard-1")


@dataclass
class SmallController:
    """asked: every change, with its arguments. refusal: what each change is answered with."""

    refusal: str = ""
    report: RebalanceReport = field(default_factory=RebalanceReport)
    asked: list[tuple[object, ...]] = field(default_factory=list)
    events: EventLog = field(default_factory=EventLog)
    running: OperationStatus | None = None
    progress: DrainProgress = field(default_factory=lambda: DrainProgress(True, {}))

    def resize(
        self,
        operation_id: str,
        shards: int | None = None,
        routers: int | None = None,
        replicas: int | None = None,
        frontends: int | None = None,
    ) -> str:
        self.asked.append(("resize", operation_id, shards, routers, replicas, frontends))
        if not self.refusal:
            self.running = OperationStatus(operation_id, "resize", "prepare", f"{shards} shards", 1, 2)
        return self.refusal

    def rebalance(self, operation_id: str, is_dry_run: bool) -> RebalanceReport:
        self.asked.append(("rebalance", operation_id, is_dry_run))
        if is_dry_run or not self.report.is_accepted:
            return self.report
        self.running = OperationStatus(operation_id, "rebalance", "prepare")
        return replace(self.report, operation_id=operation_id)

    def drain(self, target: str, grace_s: float) -> str:
        self.asked.append(("drain", target, grace_s))
        return self.refusal

    def undo_drain(self, target: str) -> str:
        self.asked.append(("undo_drain", target))
        return self.refusal

    def drain_progress(self, target: str) -> DrainProgress:
        return self.progress

    def operation(self, operation_id: str) -> OperationStatus | None:
        if self.running is not None and self.running.operation_id == operation_id:
            return self.running
        return self.events.operation(operation_id)

    def abort(self, operation_id: str) -> str:
        self.asked.append(("abort", operation_id))
        if self.running is None or self.running.operation_id != operation_id:
            return f"{operation_id} does not run"
        self.end(replace(self.running, phase="aborted", reason="an operator has aborted it"))
        return ""

    def pause_autoscaling(self, is_paused: bool) -> str:
        self.asked.append(("pause_autoscaling", is_paused))
        return self.refusal

    def decisions(self) -> list[str]:
        return ['{"kind": "copies", "decision": "hold"}', '{"kind": "shards", "decision": "up"}']

    def stats(self) -> ControllerStats:
        return ControllerStats(PARTS, {}, {}, {"shard-0": 64, "shard-1": 64}, {}, self.running, "on")

    def events_after(self, number: int, limit: int) -> list[Event]:
        return self.events.after(number, limit)

    def end(self, operation: OperationStatus) -> None:
        self.running = None
        self.events.ended(operation)

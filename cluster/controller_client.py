"""Speaks with a deployment's controller, also while Ray starts it again."""

import time
from typing import Any

import ray

from checkpoint.errors import DroverError
from cluster.events import KEPT, Event
from cluster.names import CONTROLLER, part_names
from cluster.reports import ControllerStats, DrainProgress, OperationStatus, RebalanceReport
from experts.placement import Placement

PATIENCE_S = 60.0
"""For a controller that Ray has to start again."""
_ANSWER_S = 10.0
_RETRY_S = 0.25


class NothingRuns(DroverError):
    """There is no deployment in the namespace."""


class ControllerClient:
    """All that can be asked of a controller may be asked again: an answer that was lost does no harm."""

    def __init__(self, namespace: str, patience_s: float = PATIENCE_S) -> None:
        self._namespace, self._patience_s = namespace, patience_s

    def drain(self, target: str, grace_s: float) -> None:
        """Let a part, or the parts of a node, go. Raises DroverError, which says why it cannot."""
        self._obey(self._ask("drain", target, grace_s))

    def undo_drain(self, target: str) -> None:
        """Want them again. Raises DroverError."""
        self._obey(self._ask("undo_drain", target))

    def stop_serving(self) -> DrainProgress:
        """Refuse new requests from now on; tells what still runs. Raises DroverError."""
        progress: DrainProgress = self._ask("stop_serving")
        return progress

    def drain_progress(self, target: str) -> DrainProgress:
        """How far a drain is. Raises DroverError."""
        progress: DrainProgress = self._ask("drain_progress", target)
        return progress

    def resize(
        self,
        operation_id: str,
        shards: int | None = None,
        routers: int | None = None,
        replicas: int | None = None,
        frontends: int | None = None,
    ) -> None:
        """Begin to change the numbers of parts; None leaves one as it is. Raises DroverError, which says why not."""
        self._obey(self._ask("resize", operation_id, shards, routers, replicas, frontends))

    def rebalance(self, operation_id: str, *, is_dry_run: bool) -> RebalanceReport:
        """Begin to place experts anew, if it is worth it, or tell what that would do. Raises DroverError."""
        report: RebalanceReport = self._ask("rebalance", operation_id, is_dry_run)
        self._obey(report.refusal)
        return report

    def change(self, operation_id: str, target: Placement, kind: str) -> None:
        """Begin to go to another placement. Raises DroverError, which says why it cannot be."""
        self._obey(self._ask("change", operation_id, target, kind))

    def operation(self, operation_id: str) -> OperationStatus | None:
        """How an operation is, or has ended; None: it is not known. Raises DroverError."""
        status: OperationStatus | None = self._ask("operation", operation_id)
        return status

    def abort(self, operation_id: str) -> None:
        """End an operation. Raises DroverError, which says why it cannot be."""
        self._obey(self._ask("abort", operation_id))

    def pause_autoscaling(self, *, is_paused: bool) -> None:
        """Scale and rebalance nothing from now on, or again. Raises DroverError."""
        self._obey(self._ask("pause_autoscaling", is_paused))

    def decisions(self) -> list[str]:
        """What autoscaling has decided lately, and on what grounds: a line of JSON each. Raises DroverError."""
        decisions: list[str] = self._ask("decisions")
        return decisions

    def events_after(self, number: int, limit: int = KEPT) -> list[Event]:
        """The newest `limit` events after this number, oldest first. Raises DroverError."""
        events: list[Event] = self._ask("events_after", number, limit)
        return events

    def stats(self) -> ControllerStats:
        """What is wanted. Raises DroverError."""
        stats: ControllerStats = self._ask("stats")
        return stats

    def _obey(self, refusal: str) -> None:
        if refusal:
            raise DroverError(refusal)

    def _ask(self, method: str, *arguments: Any) -> Any:
        deadline_s = time.monotonic() + self._patience_s
        while True:
            try:
                controller = ray.get_actor(CONTROLLER, namespace=self._namespace)
                return ray.get(getattr(controller, method).remote(*arguments), timeout=_ANSWER_S)
            except ValueError:
                if not part_names(self._namespace):
                    raise NothingRuns(f"nothing runs in namespace {self._namespace!r}") from None
                reason = "there is none yet"
            except ray.exceptions.RayTaskError:
                raise  # a defect, which does not go away
            except ray.exceptions.RayError as error:
                reason = type(error).__name__
            if time.monotonic() > deadline_s:
                raise DroverError(f"the controller did not answer within {self._patience_s:g} s: {reason}")
            time.sleep(_RETRY_S)  # Ray tells nobody when it has started an actor again

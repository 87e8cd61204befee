"""Speaks with a deployment's controller, also while Ray starts it again."""

import time
from typing import Any

import ray

from checkpoint.errors import DroverError
from cluster.names import CONTROLLER, part_names
from cluster.reports import ControllerStats, DrainProgress

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

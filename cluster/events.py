"""What has happened in a deployment: a bounded log, which outlives the controller's process."""

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from cluster.reports import OperationStatus

logger = logging.getLogger(__name__)

KEPT = 256
# Events that were not stored before the process ended have used some numbers after the stored ones.
GAP = 1000


@dataclass(frozen=True)
class Event:
    """number: they rise, with gaps. time_s: since 1970. kind: "part", "operation" or "decision".

    subject: the part, the operation's id, or what was decided about. text: what happened, with its
    numbers. data: the same for programs, as plain JSON.
    """

    number: int
    time_s: float
    kind: str
    subject: str
    text: str
    data: dict[str, Any]


class EventLog:
    """The newest KEPT events, for any thread.

    Example: `log.add("part", "shard-1", "died; Ray starts it again", restarts=2)`.
    """

    def __init__(
        self,
        stored: str = "",
        store: Callable[[str], None] = lambda events: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """stored: what was given to `store` last, perhaps in another process."""
        read = [Event(**event) for event in json.loads(stored)] if stored else []
        self._events = deque(read, maxlen=KEPT)
        self._next = read[-1].number + GAP if read else 1
        self._stored = self._next - 1
        self._store, self._clock = store, clock
        self._lock = threading.Lock()

    def add(self, kind: str, subject: str, text: str, /, **data: Any) -> None:
        """Note what has just happened."""
        with self._lock:
            self._events.append(Event(self._next, self._clock(), kind, subject, text, data))
            self._next += 1

    def ended(self, operation: OperationStatus) -> None:
        """Note that an operation is done or was aborted, and store it: somebody may wait for its end."""
        assert operation.has_ended
        text = f"aborted: {operation.reason}" if operation.phase == "aborted" else "done"
        if operation.text:
            text = f"{operation.kind} to {operation.text} {text}"
        self.add("operation", operation.operation_id, text, **asdict(operation))
        self.store()

    def operation(self, operation_id: str) -> OperationStatus | None:
        """How an operation has ended; None if it has not, or too long ago."""
        for event in reversed(self.after(0)):
            if event.kind == "operation" and event.subject == operation_id and event.data.get("phase"):
                return OperationStatus(**event.data)
        return None

    def after(self, number: int, limit: int = KEPT) -> list[Event]:
        """The newest `limit` events after this number, oldest first."""
        with self._lock:
            later = [event for event in self._events if event.number > number]
        return later[len(later) - limit :] if limit < len(later) else later

    def store(self) -> None:
        """Store all events, if there are new ones. Raises nothing: those that are lost are stored with the next."""
        with self._lock:
            newest = self._next - 1
            if newest == self._stored:
                return
            text = json.dumps([asdict(event) for event in self._events])
        try:
            self._store(text)
            self._stored = newest
        except Exception:
            logger.exception("storing events failed")

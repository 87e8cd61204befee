"""How far an actor has come: what the launcher's progress bars and `drover status` show."""

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from checkpoint.errors import DroverError

logger = logging.getLogger(__name__)


class Phase(str, Enum):
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True)
class ActorState:
    """bytes_done of bytes_total checkpoint bytes are read. pid: of the actor's process on its node.
    error: why, when the phase is FAILED. waits_for: what keeps an actor LOADING that has read its weights."""

    pid: int
    phase: Phase
    bytes_done: int
    bytes_total: int
    error: str = ""
    waits_for: str = ""

    @property
    def summary(self) -> str:
        if self.phase is Phase.FAILED:
            return f"failed: {self.error}"
        if self.phase is Phase.LOADING:
            waiting = f", waiting for {self.waits_for}" if self.waits_for else ""
            return f"loading, {self.bytes_done} of {self.bytes_total} bytes{waiting}"
        return "ready"


class LoadProgress:
    """Filled by the loading thread, read by any other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phase, self._done, self._total, self._error = Phase.LOADING, 0, 0, ""
        self._waits_for: Callable[[], str] | None = None

    def run(self, load: Callable[[], None]) -> None:
        """Run `load` and remember how it ended."""
        try:
            load()
        except DroverError as error:
            self._finish(Phase.FAILED, str(error))
        except Exception as error:
            logger.exception("loading failed")
            self._finish(Phase.FAILED, f"{type(error).__name__}: {error}")
        else:
            self._finish(Phase.READY)

    def expect(self, total: int) -> None:
        with self._lock:
            self._total = total

    def add_bytes(self, count: int) -> None:
        with self._lock:
            self._done += count

    def wait(self, wait: Callable[[], None], waits_for: Callable[[], str]) -> None:
        """Call `wait`; until it returns, states say what is waited for, as `waits_for` tells it then."""
        with self._lock:
            self._waits_for = waits_for
        wait()
        with self._lock:
            self._waits_for = None

    def state(self) -> ActorState:
        with self._lock:
            waits_for = self._waits_for() if self._waits_for else ""
            return ActorState(os.getpid(), self._phase, self._done, self._total, self._error, waits_for)

    def _finish(self, phase: Phase, error: str = "") -> None:
        with self._lock:
            self._phase, self._error = phase, error

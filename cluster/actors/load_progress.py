"""How far an actor has come with loading, filled by the loading thread and read by any other."""

import logging
import os
import threading
from collections.abc import Callable

from checkpoint.errors import DroverError
from cluster.reports import ActorState, Phase

logger = logging.getLogger(__name__)


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
        """Call `wait`; until it returns, states say what is waited for, as `waits_for` tells it
        then."""
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

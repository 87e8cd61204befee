"""How far an actor has come with loading, and loading again after a failure.

A file that cannot be read for a moment, or memory that another process gives back later, must not
leave a part failed for ever: whoever restarts it would have to be a person.
"""

import logging
import os
import threading
import time
from collections.abc import Callable

from checkpoint.errors import DroverError
from cluster.reports import ActorState, Phase

logger = logging.getLogger(__name__)

FIRST_RETRY_S, LAST_RETRY_S = 1.0, 60.0
"""After a failure, the wait before the next try; doubled each time, up to the last."""


class LoadProgress:
    """Filled by the loading thread, read by any other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phase, self._done, self._total, self._error = Phase.LOADING, 0, 0, ""
        self._retry_at_s: float | None = None
        self._waits_for: Callable[[], str] | None = None

    def run(self, load: Callable[[], None], first_retry_s: float = FIRST_RETRY_S) -> None:
        """Run `load` until it succeeds, with growing waits. Meanwhile `state` says why it failed last."""
        retry_s = first_retry_s
        while not self._succeeds(load, retry_s):
            time.sleep(retry_s)  # nothing tells when the cause is gone
            retry_s = min(2 * retry_s, LAST_RETRY_S)
            with self._lock:
                self._phase, self._done, self._retry_at_s, self._waits_for = Phase.LOADING, 0, None, None

    def _succeeds(self, load: Callable[[], None], retry_s: float) -> bool:
        try:
            load()
        except Exception as error:
            if not isinstance(error, DroverError):
                logger.exception("loading failed")
            reason = str(error) if isinstance(error, DroverError) else f"{type(error).__name__}: {error}"
            with self._lock:
                self._phase, self._error, self._retry_at_s = Phase.FAILED, reason, time.monotonic() + retry_s
            return False
        with self._lock:
            self._phase, self._error = Phase.READY, ""
        return True

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
            retry_s = None if self._retry_at_s is None else max(0.0, self._retry_at_s - time.monotonic())
            return ActorState(os.getpid(), self._phase, self._done, self._total, self._error, waits_for, retry_s)

"""Notices that a thread hangs, and never takes slowness for that."""

import threading
import time
from collections.abc import Callable

_LOOKS = 4  # in each stuck_after_s
_WORKS = 0.01  # of the time between two looks: a thread that has used so much of a processor works


class StuckWatch:
    """Watches one thread from another one, until `close`.

    The thread is stuck if it has something to do, does not get on, and uses no processor. Compiling,
    a huge batch and a slow disk are slowness: the thread works, or gets on. Looks are counted, not
    seconds: while the whole process is stopped, nobody looks.
    """

    def __init__(
        self,
        thread: threading.Thread,
        progress: Callable[[], object],
        stuck_after_s: float | None,
        on_stuck: Callable[[], None],
    ) -> None:
        """thread: has been started. progress: None while it has nothing to do, else what changes as it gets on.

        stuck_after_s: how long it may hang; None: for ever. on_stuck: called once, in the watch's
        thread.
        """
        assert thread.ident is not None
        self._clock = time.pthread_getcpuclockid(thread.ident)
        self._progress, self._on_stuck = progress, on_stuck
        self._closed = threading.Event()
        if stuck_after_s is not None:
            name = f"watch {thread.name}"
            threading.Thread(target=self._run, args=(stuck_after_s / _LOOKS,), name=name, daemon=True).start()

    def close(self) -> None:
        """The watched thread may end now."""
        self._closed.set()

    def _run(self, pause_s: float) -> None:
        seen, used_s, looks = None, 0.0, 0
        while not self._closed.wait(pause_s):
            progress, now_used_s = self._progress(), self._used_s()
            hangs = progress is not None and progress == seen and now_used_s - used_s < _WORKS * pause_s
            seen, used_s, looks = progress, now_used_s, looks + 1 if hangs else 0
            if looks == _LOOKS:
                self._on_stuck()
                return

    def _used_s(self) -> float:
        """Processor time of the thread."""
        try:
            return time.clock_gettime(self._clock)
        except OSError:  # it has just ended
            return 0.0

"""A thread that hangs is told from one that is slow, or idle."""

import threading
import time
from collections.abc import Callable

import pytest

from experts.stuck_watch import StuckWatch
from tests.processes import PATIENCE_S

STUCK_AFTER_S = 0.2


def watched(work: Callable[[threading.Event], None], progress: Callable[[], object]) -> bool:
    """Whether a thread that does `work` until the event is set counts as stuck within ten times STUCK_AFTER_S."""
    may_end, stuck = threading.Event(), threading.Event()
    thread = threading.Thread(target=work, args=(may_end,))
    thread.start()
    watch = StuckWatch(thread, progress, STUCK_AFTER_S, stuck.set)
    is_stuck = stuck.wait(10 * STUCK_AFTER_S)
    watch.close()
    may_end.set()
    thread.join(PATIENCE_S)
    return is_stuck


def hang(may_end: threading.Event) -> None:
    may_end.wait(PATIENCE_S)


def work(may_end: threading.Event) -> None:
    while not may_end.is_set():
        pass


@pytest.mark.parametrize(
    ("doing", "progress", "is_stuck"),
    [
        (hang, lambda: 1, True),
        (hang, lambda: None, False),
        (hang, time.monotonic, False),
        (work, lambda: 1, False),
    ],
    ids=["hangs", "has nothing to do", "gets on", "works, however long it takes"],
)
def test_only_a_thread_that_hangs_is_stuck(
    doing: Callable[[threading.Event], None], progress: Callable[[], object], is_stuck: bool
) -> None:
    assert watched(doing, progress) == is_stuck

"""Several processor cores at one piece of work, each taking the next item when it has done its last.

With equal shares, all cores wait for the one that something else held up: a core that serves a stream, or that another
process computes on. Here the others take over what it has not begun.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


class Cores:
    """The calling thread and threads - 1 more, which compute with one torch thread each. Used by one thread at once."""

    def __init__(self, threads: int, name: str) -> None:
        self.threads = threads
        self._others = ThreadPoolExecutor(max(1, threads - 1), name, _begin, (_cores_of_others(threads),))

    def run(self, work: Callable[[], None], items: int) -> None:
        """Call work() in as many threads as are worth having for `items` items, and return when all items are done.

        All calls take their items from one counter that they share (experts/counters.py), until none is left. So a
        thread that has not begun when the first one returns has nothing to do, and is not waited for.
        """
        others = [self._others.submit(work) for _ in range(min(self.threads, items) - 1)]
        try:
            work()
        finally:
            for other in others:
                if not other.cancel():
                    other.result()


def settle(threads: int) -> None:
    """Let torch compute with `threads` threads in this one; if they are as many as the cores, give each a core.

    To be called once, at the beginning of a thread of ours that computes: torch's own number of threads holds for the
    thread that set it, and for those that begin to compute before another thread sets it again. Linux puts a thread
    that it wakes on a core that is idle at that instant; where several processes take turns at the cores, that was
    often its partner's: beside a shard's, two threads of a router then shared one core for milliseconds.
    """
    torch.set_num_threads(threads)
    others = _cores_of_others(threads)
    if not others:
        return
    os.sched_setaffinity(0, others)
    torch.ones(threads * 2**17).neg_()  # begins torch's other threads, which inherit where they may run
    os.sched_setaffinity(0, _CORES[:1])


def share_of_cores(sharers: int) -> int:
    """How many of this machine's cores each of `sharers` processes should compute with, that do so at the same time."""
    return max(1, (len(_CORES) or os.cpu_count() or 1) // sharers)


def _cores_of_others(threads: int) -> set[int]:
    """All cores but the first, if they are as many as `threads`; else none."""
    return set(_CORES[1:]) if len(_CORES) == threads else set()


def _begin(cores: set[int]) -> None:
    torch.set_num_threads(1)
    if cores:
        os.sched_setaffinity(0, cores)

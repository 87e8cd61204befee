"""Several processor cores at one piece of work, each taking the next item when it has done its last.

With equal shares, all cores wait for the one that something else held up: a core that serves a stream, or that another
process computes on. Here the others take over what it has not begun.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import torch

_CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


class Cores:
    """The calling thread and threads - 1 more, which compute with one torch thread each. Used by one thread at once."""

    def __init__(self, threads: int, name: str) -> None:
        self.threads = threads
        self._others = ThreadPoolExecutor(max(1, threads - 1), name, torch.set_num_threads, (1,))
        # Begun now, because the number of torch's threads that each sets would also hold for threads that begin later.
        torch_threads, begun = torch.get_num_threads(), threading.Barrier(threads)
        for _ in range(threads - 1):
            self._others.submit(_begin, _cores_of_others(threads), begun)
        begun.wait()
        torch.set_num_threads(torch_threads)

    def run(self, work: Callable[[], None], items: int) -> None:
        """Call work() in as many threads as are worth having for `items` items, and return when all items are done.

        Each call must take items, which the calls share (kernels/cpu/counters.py), until none is left, and finish what
        it took. So a thread that has not begun when the first one returns has nothing to do, and is not waited for.
        """
        others = [self._others.submit(work) for _ in range(min(self.threads, items) - 1)]
        try:
            work()
        finally:
            wait([other for other in others if not other.cancel()])
        for other in others:
            if not other.cancelled():
                other.result()


def settle(threads: int) -> None:
    """Let torch compute with `threads` threads in this one; if these are two, and the cores too, give each a core.

    To be called once, at the beginning of a thread of ours that computes: torch's own number of threads holds for the
    thread that set it, and for those that begin to compute before another thread sets it again. Linux puts a thread
    that it wakes on a core that is idle at that instant; where several processes take turns at the cores, that was
    often its partner's: beside a shard's, two threads of a router then shared one core for milliseconds. With more
    cores this was not measured, and OpenMP, which now and then begins its threads anew, would begin them on ours.
    """
    torch.set_num_threads(threads)
    others = _cores_of_others(threads)
    if others:
        _keep_to(others)
        torch.ones(threads * 2**17).neg_()  # begins torch's other thread, which inherits where it may run
        _keep_to(_CORES[:1])


def share_of_cores(sharers: int) -> int:
    """How many of this machine's cores each of `sharers` processes should compute with, that do so at the same time."""
    return max(1, (len(_CORES) or os.cpu_count() or 1) // sharers)


def _cores_of_others(threads: int) -> list[int]:
    """Where all threads but the first are to run; empty for anywhere."""
    return _CORES[1:] if len(_CORES) == threads == 2 else []


def _begin(cores: list[int], begun: threading.Barrier) -> None:
    if cores:
        _keep_to(cores)
    begun.wait()


def _keep_to(cores: list[int]) -> None:
    try:
        os.sched_setaffinity(0, cores)
    except OSError:  # the process may no longer run there, or not choose; it then runs where the system lets it
        pass

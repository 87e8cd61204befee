"""Work shared by several processor cores: each takes the next item when it has finished its last.

With equal shares, all cores would wait for the slowest: one that also serves a stream, or that
another process uses.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import torch

_CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


class Cores:
    """The calling thread and threads - 1 others, each with one torch thread.

    One thread at a time may use it.
    """

    def __init__(self, threads: int, name: str) -> None:
        self.threads = threads
        self._others = ThreadPoolExecutor(max(1, threads - 1), name, torch.set_num_threads, (1,))
        # Each new thread sets torch's thread count to 1, which threads that begin later would
        # inherit. So all are started here, and the count is restored.
        torch_threads, begun = torch.get_num_threads(), threading.Barrier(threads)
        for _ in range(threads - 1):
            self._others.submit(_begin, _cores_of_others(threads), begun)
        begun.wait()
        torch.set_num_threads(torch_threads)

    def run(self, work: Callable[[], None], items: int) -> None:
        """Call work() in up to `items` threads, and return when all items are done.

        Each call takes items from a shared counter (kernels/cpu/counters.py) until none is left,
        and finishes what it took. So when one call returns, a thread that has not begun has
        nothing left to do: it is not waited for.
        """
        others = [self._others.submit(work) for _ in range(min(self.threads, items) - 1)]
        try:
            work()
        finally:
            wait([other for other in others if not other.cancel()])
        for other in others:
            if not other.cancelled():
                other.result()


def set_compute_threads(threads: int) -> None:
    """Set this thread's torch thread count.

    On a two-core machine with two threads, also pin each to its own core.

    Call it once at the start of a thread that computes. torch keeps the count for the thread that
    set it, and for threads that first compute before another thread sets it.

    Why pin: Linux wakes a thread on a core that is idle at that instant. Where several processes
    take turns, that was often the core of the thread's partner, and a router's two threads shared
    one core for milliseconds. With more cores this was not measured. There OpenMP sometimes
    restarts its threads, and they would inherit our core.
    """
    torch.set_num_threads(threads)
    others = _cores_of_others(threads)
    if others:
        _pin(others)
        torch.ones(threads * 2**17).neg_()  # starts torch's other thread, which is pinned the same
        _pin(_CORES[:1])


def share_of_cores(sharers: int) -> int:
    """Threads for each of `sharers` processes that compute on this machine at the same time."""
    return max(1, (len(_CORES) or os.cpu_count() or 1) // sharers)


def _cores_of_others(threads: int) -> list[int]:
    """Cores for all threads but the first; empty means any."""
    return _CORES[1:] if len(_CORES) == threads == 2 else []


def _begin(cores: list[int], begun: threading.Barrier) -> None:
    if cores:
        _pin(cores)
    begun.wait()


def _pin(cores: list[int]) -> None:
    try:
        os.sched_setaffinity(0, cores)
    except OSError:  # the process may not choose, or no longer has this core
        pass

"""Several cores at one piece of work: nobody is waited for in vain, nothing is lost, and torch's settings stay."""

import os
import threading

import numpy as np
import pytest
import torch

from kernels.cores import Cores, set_compute_threads
from kernels.cpu.compiled import compiled
from kernels.cpu.counters import take
from tests.processes import PATIENCE_S


@compiled()
def _mark_all(counter, done):
    while True:
        item = take(counter)
        if item >= len(done):
            return
        done[item] += 1


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_item_is_done_once(threads: int) -> None:
    cores = Cores(threads, "test")
    for _ in range(50):
        counter, done = np.zeros(1, np.int64), np.zeros(1000, np.int64)
        cores.run(lambda counter=counter, done=done: _mark_all(counter, done), threads)
        assert np.all(done == 1)


def test_a_thread_that_has_not_begun_is_not_waited_for() -> None:
    cores, held, release = Cores(2, "test"), threading.Event(), threading.Event()
    caller, callers = threading.get_ident(), []

    def hold_the_other() -> None:
        if threading.get_ident() != caller:
            held.set()
            release.wait(PATIENCE_S)
        else:
            held.wait(PATIENCE_S)

    holding = threading.Thread(target=lambda: cores._others.submit(hold_the_other))
    holding.start()
    holding.join()
    assert held.wait(PATIENCE_S)
    cores.run(lambda: callers.append(threading.get_ident()), 2)
    assert callers == [caller]
    release.set()


def test_an_error_in_another_thread_is_raised() -> None:
    caller, begun = threading.get_ident(), threading.Event()

    def work() -> None:
        if threading.get_ident() != caller:
            begun.set()
            raise MemoryError("in another thread")
        assert begun.wait(PATIENCE_S)

    with pytest.raises(MemoryError, match="in another thread"):
        Cores(2, "test").run(work, 2)


def test_other_threads_find_torchs_number_of_threads_as_it_was() -> None:
    before, seen = torch.get_num_threads(), []
    try:
        torch.set_num_threads(3)
        Cores(2, "test").run(lambda: None, 2)
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert seen == [3]


def test_compute_threads_are_set_for_the_calling_thread_only() -> None:
    everywhere, seen = os.sched_getaffinity(0), []

    def compute() -> None:
        set_compute_threads(len(everywhere))
        seen.append((os.sched_getaffinity(0), torch.get_num_threads()))

    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    assert os.sched_getaffinity(0) == everywhere
    assert seen == [({min(everywhere)} if len(everywhere) == 2 else everywhere, len(everywhere))]

"""Where the time of an engine's steps goes."""

from collections import deque
from collections.abc import Callable
from itertools import pairwise
from time import perf_counter
from typing import Literal

Phase = Literal["schedule", "attention", "dispatch", "expert_wait", "sample", "other"]
PHASES: tuple[Phase, ...] = ("schedule", "attention", "dispatch", "expert_wait", "sample", "other")

# More than a step has; so that steps that nobody stops do not pile up.
MAX_MARKS = 4096


class StepClock:
    """A stopwatch with one hand: at any time of a step exactly one phase runs.

    schedule: choosing the step's tokens. attention: norm, projections and attention. dispatch: norm, expert gate,
    sorting, sending; over LocalLinks, which compute when asked, also the experts themselves. expert_wait: in `combine`,
    after the shared expert, until the last shard's reply is back in order. sample: output head, sampler,
    log-probabilities. other: embedding, dense MLPs, shared experts, handing out tokens.
    On CUDA a phase is the time in which its kernels are queued; the wait for them falls on whoever needs a result
    first, which is dispatch (it must know how many rows go where) or sample.
    """

    def __init__(self) -> None:
        self.seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        """Since the start, by phase."""
        self._marks: deque[tuple[Phase, float]] = deque(maxlen=MAX_MARKS)
        # Between matrices that fill the caches, a Python function would take 1 us per mark; this is not one.
        self.mark: Callable[[tuple[Phase, float]], None] = self._marks.append
        """mark((phase, perf_counter())): the phase that ran ends, and `phase` begins."""

    def start(self) -> None:
        """A step begins, with "schedule". What follows an earlier `start` without `stop` is not counted."""
        self._marks.clear()
        self.mark(("schedule", perf_counter()))

    def stop(self) -> float:
        """The step ends; seconds since `start`."""
        self.mark(("other", perf_counter()))
        for (phase, begin_s), (_, end_s) in pairwise(self._marks):
            self.seconds[phase] += end_s - begin_s
        return self._marks[-1][1] - self._marks[0][1]

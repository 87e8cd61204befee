"""Measures how the time of an engine's steps is spent, by phase."""

from collections import deque
from collections.abc import Callable
from itertools import pairwise
from time import perf_counter
from typing import Literal

Phase = Literal["schedule", "attention", "dispatch", "expert_wait", "sample", "other"]
PHASES: tuple[Phase, ...] = ("schedule", "attention", "dispatch", "expert_wait", "sample", "other")

# More than one step makes. It bounds memory if `stop` is never called.
MAX_MARKS = 4096


class StepClock:
    """A stopwatch: at any time of a step exactly one phase runs.

    schedule: choosing the step's tokens.
    attention: norm, projections and attention.
    dispatch: norm, expert gate, sorting, sending. LocalLinks compute when asked, so over these it
    includes the experts.
    expert_wait: in `combine`, after the shared expert, until all replies are back in order.
    sample: output head, sampler, log-probabilities.
    other: embedding, dense MLPs, shared experts, handing out tokens.

    On CUDA a phase is the time in which its kernels are queued. The phase that first needs a result
    pays for the wait: dispatch, which must know how many rows go where, or sample.
    """

    def __init__(self) -> None:
        self.seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        """Since the start, by phase."""
        self._marks: deque[tuple[Phase, float]] = deque(maxlen=MAX_MARKS)
        # A bare deque.append: with cold caches, between large products, a Python function takes 1
        # us per mark.
        self.mark: Callable[[tuple[Phase, float]], None] = self._marks.append
        """mark((phase, perf_counter())): ends the current phase and begins `phase`."""

    @property
    def last_mark(self) -> tuple[Phase, float] | None:
        """The newest mark of this step or the last. From any thread."""
        try:
            return self._marks[-1]
        except IndexError:
            return None

    def start(self) -> None:
        """Begin a step, in phase "schedule". A step that was not stopped is not counted."""
        self._marks.clear()
        self.mark(("schedule", perf_counter()))

    def stop(self) -> float:
        """End the step. Returns seconds since `start`."""
        self.mark(("other", perf_counter()))
        for (phase, begin_s), (_, end_s) in pairwise(self._marks):
            self.seconds[phase] += end_s - begin_s
        return self._marks[-1][1] - self._marks[0][1]

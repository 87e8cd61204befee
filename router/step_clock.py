"""Where the time of an engine's steps goes."""

import time
from typing import Literal

Phase = Literal["schedule", "attention", "dispatch", "expert_wait", "sample", "other"]
PHASES: tuple[Phase, ...] = ("schedule", "attention", "dispatch", "expert_wait", "sample", "other")


class StepClock:
    """A stopwatch with one hand: at any time of a step exactly one phase runs. Marking costs about 0.15 us.

    schedule: choosing the step's tokens. attention: norm, projections and attention. dispatch: expert gate, sorting,
    sending; over LocalLinks, which compute when asked, also the experts themselves.
    expert_wait: in `combine`, after the shared expert, until the last shard's reply is back in order. sample: output
    head, sampler, log-probabilities. other: embedding, dense MLPs, shared experts, handing out tokens.
    On CUDA a phase is the time in which its kernels are queued; the wait for them falls on whoever needs a result
    first, which is dispatch (it must know how many rows go where) or sample.
    """

    def __init__(self) -> None:
        self.seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        """Since the start, by phase."""
        self._phase: Phase = "other"
        self._began_s = self._since_s = 0.0

    def start(self, phase: Phase) -> None:
        """A step begins, with `phase`. What follows an earlier `start` without `stop` is not counted."""
        self._phase = phase
        self._began_s = self._since_s = time.perf_counter()

    def enter(self, phase: Phase) -> float:
        """The phase that ran ends now, which is returned (time.perf_counter), and `phase` begins."""
        now_s = time.perf_counter()
        self.seconds[self._phase] += now_s - self._since_s
        self._phase, self._since_s = phase, now_s
        return now_s

    def stop(self) -> float:
        """The step ends; seconds since `start`."""
        self.enter("other")
        return self._since_s - self._began_s

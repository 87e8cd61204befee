"""What an engine counts of its steps and requests, and the clock of each step."""

import time
from collections.abc import Iterable, Sequence

from router.counts.expert_load import ExpertLoad
from router.counts.requests import STEP_BOUNDS_S, Histogram, RequestMetrics
from router.counts.step_clock import StepClock
from router.schedule.sequence import Work


class EngineCounts:
    """One thread counts: start_step, start_work, then postprocessing and end_step, or fail_step.

    clock, expert_load: the model's, which mark and count while a step runs.
    """

    def __init__(self, clock: StepClock, expert_load: ExpertLoad) -> None:
        self.clock = clock
        self.expert_load = expert_load
        self.requests = RequestMetrics()
        self.step_s = Histogram(STEP_BOUNDS_S)
        self.prompt_tokens = self.generated_tokens = self.steps = 0
        self._work_started_s = 0.0

    def start_step(self) -> None:
        """A step begins, with choosing its work."""
        self.clock.start()
        self.expert_load.start_step()

    def start_work(self, works: Sequence[Work]) -> None:
        """The step's work is chosen."""
        self._work_started_s = time.perf_counter()
        self.clock.mark(("other", self._work_started_s))
        self.requests.started([work.sequence.request.request_id for work in works], self._work_started_s)

    def work_done(self, works: Iterable[Work]) -> None:
        """The model has computed `works`; their sequences are not yet advanced."""
        now_s = time.perf_counter()
        self.clock.mark(("other", now_s))
        sampling = [work.sequence.request.request_id for work in works if work.samples]
        self.requests.made(sampling, now_s)
        self.generated_tokens += len(sampling)
        self.steps += 1
        for work in works:
            prompt_end = min(work.first + work.length, len(work.sequence.request.prompt_token_ids))
            self.prompt_tokens += max(0, prompt_end - work.first)

    def end_step(self) -> float:
        """The step is done; seconds since its work was chosen."""
        work_s = time.perf_counter() - self._work_started_s
        self.expert_load.end_step()
        self.step_s.observe(self.clock.stop())
        return work_s

    def fail_step(self) -> None:
        """The step has failed: its time counts, its tokens do not."""
        self.step_s.observe(self.clock.stop())

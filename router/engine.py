"""The loop that serves: schedule, run, postprocess."""

import logging
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate, islice

from router.counts.engine import EngineCounts
from router.counts.requests import EngineSnapshot, EngineStats
from router.errors import AlreadyExists, DeadlineExceeded, ExpertsAway, Internal, RequestError, ResourceExhausted
from router.model.dispatch import TokensFailed
from router.model.llama4 import Model
from router.request import GenerationRequest, TokenDelta, TokenLogprobs, request_limits
from router.runner import LocalRunner, MakeRunner
from router.sampling.logprobs import NOT_FINITE, RowFailed
from router.sampling.sampler import SampledToken
from router.sampling.state import SamplingState
from router.schedule.kv_layout import KvLayout
from router.schedule.limits import SchedulerLimits
from router.schedule.scheduler import Scheduler
from router.schedule.sequence import Work
from router.step import StepOutput, assemble

logger = logging.getLogger(__name__)


class Engine:
    """One router's requests, from submission to the last token. Not thread-safe: one thread owns it."""

    def __init__(
        self,
        model: Model,
        limits: SchedulerLimits,
        max_context_tokens: int | None = None,
        layout: KvLayout | None = None,
        make_runner: MakeRunner = LocalRunner,
    ) -> None:
        """max_context_tokens: prompt and completion together; None: all positions that the model has.
        layout: of the KV cache; None: the model's. make_runner: who computes the steps."""
        self.request_limits = request_limits(model.config, max_context_tokens)
        self.threads = model.threads
        self._eos_token_ids = frozenset(model.config.eos_token_ids)
        layout = layout or model.kv_layout
        self._scheduler = Scheduler(limits, layout, time.monotonic)
        self._runner = make_runner(model, layout, self._scheduler.pool.num_units, limits.max_running)
        self._sampling: dict[str, SamplingState] = {}
        self._dispatcher = model.dispatcher
        self._counts = EngineCounts(model.clock, model.dispatcher.load)

    @property
    def stats(self) -> EngineStats:
        scheduler, counts = self._scheduler, self._counts
        return EngineStats(
            counts.prompt_tokens,
            counts.generated_tokens,
            counts.steps,
            scheduler.num_running,
            scheduler.num_waiting,
            scheduler.kv_bytes_used,
            scheduler.kv_bytes_cached,
            scheduler.kv_bytes_total,
            scheduler.counters.prefix_queried_tokens,
            scheduler.counters.prefix_hit_tokens,
            scheduler.counters.preemptions,
            sum(counts.requests.replayed.values()),
        )

    @property
    def snapshot(self) -> EngineSnapshot:
        """Everything that is counted; from any one thread."""
        counts, asker = self._counts, self._dispatcher.asker
        return EngineSnapshot(
            self.stats,
            counts.requests.copy(),
            counts.step_s.copy(),
            dict(counts.clock.seconds),
            dict(asker.rows_of_shard),
            dict(asker.retries),
            dict(asker.slowness()),
            counts.expert_load.summary(),
        )

    @property
    def has_work(self) -> bool:
        return self._scheduler.num_running + self._scheduler.num_waiting > 0

    @property
    def progress(self) -> object:
        """Another value whenever a layer of a step, or what is before and behind them, has begun. From any thread."""
        return self._counts.steps, self._counts.clock.last_mark

    def submit(self, request: GenerationRequest, arrived_s: float | None = None) -> None:
        """Queue a request that `check_request` has passed. Raises ResourceExhausted, AlreadyExists.

        arrived_s: when it came, by time.perf_counter; None: now. After any exception, a defect's
        included, the engine is as it was before.
        """
        try:
            self._scheduler.enqueue(request)
        except (ResourceExhausted, AlreadyExists):
            self._counts.requests.refused()
            raise
        try:
            state = SamplingState(request.sampling, request.prompt_token_ids, self._eos_token_ids, request.made)
        except Exception:
            self._scheduler.remove(request.request_id)
            raise
        self._sampling[request.request_id] = state
        arrived_s = time.perf_counter() if arrived_s is None else arrived_s
        prompt_tokens = len(request.prompt_token_ids)
        self._counts.requests.arrived(request.request_id, arrived_s, prompt_tokens, request.replayed)

    def cancel(self, request_id: str, ending: str) -> None:
        """Forget a request and free its memory; no delta follows. One that has just ended is ignored.

        ending: how it is counted, one of ENDINGS.
        """
        self._scheduler.remove(request_id)
        self._forget(request_id, ending, time.perf_counter())

    def step(self) -> list[TokenDelta]:
        """Run one step and return what it added to each request, or why requests had to end."""
        expired = self.end_expired()
        self._counts.start_step()
        works = self._scheduler.schedule()
        return expired + (self._run(works) if works else [])

    def call_while_waiting(self, look: Callable[[], None]) -> None:
        """Have `look` called now and then while a step waits for shards, in the engine's thread.

        It may submit and cancel. If it raises a RequestError, the step ends, and its requests with
        it.
        """
        self._dispatcher.asker.while_waiting = look

    def wake(self) -> None:
        """Have a step that waits call `look` soon. From any thread."""
        self._dispatcher.wake()

    def end_expired(self) -> list[TokenDelta]:
        """End the requests whose timeout has passed."""
        error = DeadlineExceeded("the request's deadline passed before it was done")
        return self._fail(self._scheduler.expired(), error)

    def fail_all(self, error: RequestError) -> list[TokenDelta]:
        """End every request, waiting or running, with `error`."""
        return self._fail(self._scheduler.request_ids, error)

    def _run(self, works: list[Work]) -> list[TokenDelta]:
        """Compute `works` in a step that has begun, and return its deltas."""
        self._counts.start_work(works)
        try:
            step = assemble(works, self._sampling)
            output = self._runner.run(step, [self._sampling[request_id] for request_id in step.sample.request_ids])
        except RequestError as error:
            self._counts.fail_step()
            return self._fail(self._request_ids(works), error)
        except TokensFailed as error:
            self._counts.fail_step()
            return self._run_without(works, error)
        except Exception as error:
            self._counts.fail_step()
            logger.error("a step of %d requests failed", len(works), exc_info=error)
            return self._run_apart(works)
        deltas = self._postprocess(works, step.prompt.counts, output)
        self._scheduler.record_step(works, self._counts.end_step())
        return deltas

    def _run_without(self, works: Sequence[Work], failure: TokensFailed) -> list[TokenDelta]:
        """End the requests whose tokens failed, and compute the others again."""
        ends = list(accumulate(work.length for work in works))
        failed = {bisect_right(ends, token) for token in failure.tokens}
        lost = [work for index, work in enumerate(works) if index in failed]
        logger.error("requests %s end: %s", self._request_ids(lost), failure)
        error = ExpertsAway(str(failure)) if failure.is_away else Internal(f"computing failed twice: {failure}")
        deltas = self._fail(self._request_ids(lost), error)
        rest = [work for index, work in enumerate(works) if index not in failed and self._scheduler.runs(work.sequence)]
        if rest:
            self._counts.start_step()
            deltas += self._run(rest)
        return deltas

    def _run_apart(self, works: list[Work]) -> list[TokenDelta]:
        """Compute each of `works`, whose step failed, in a step of its own.

        The cause, a defect or memory that ran out, may concern one of them only. That one fails
        again. Clients are not told to try it again: each time it would cost the others such steps.
        """
        if len(works) == 1:
            return self._fail(self._request_ids(works), Internal("the router failed in a step; its log says why"))
        deltas = []
        for work in works:
            if self._scheduler.runs(work.sequence):
                self._counts.start_step()
                deltas += self._run([work])
        return deltas

    def _postprocess(self, works: Sequence[Work], prompt_counts: Sequence[int], output: StepOutput) -> list[TokenDelta]:
        """Take the step's tokens, and tell each request what it has got.

        prompt_counts: how many of output.prompt_logprobs are each work's.
        """
        # Some may have been cancelled, or their time was up, while the step waited for shards.
        self._counts.work_done([work for work in works if self._scheduler.runs(work.sequence)])
        sampled, prompt_logprobs = iter(output.sampled), iter(output.prompt_logprobs)
        deltas = []
        for work, count in zip(works, prompt_counts, strict=True):
            rows, token = list(islice(prompt_logprobs, count)), next(sampled) if work.samples else None
            if not self._scheduler.runs(work.sequence):
                continue
            told = tuple(entry for entry in rows if not isinstance(entry, RowFailed))
            if isinstance(token, RowFailed) or len(told) < len(rows):
                deltas += self._fail_row(work, token if isinstance(token, RowFailed) else NOT_FINITE)
                continue
            delta = self._advance(work, token, told)
            if delta is not None:
                deltas.append(delta)
        return deltas

    def _fail_row(self, work: Work, failure: RowFailed) -> list[TokenDelta]:
        """End the one request that has no token. Its keys and values may be bad: nobody may share them."""
        request_id = work.sequence.request.request_id
        logger.error("request %s ends: %s", request_id, failure.reason)
        self._scheduler.remove(request_id, unpublish=True)
        return self._fail([request_id], Internal(failure.reason))

    def _advance(self, work: Work, token: SampledToken | None, told: tuple[TokenLogprobs, ...]) -> TokenDelta | None:
        """The delta of one request's work, if it makes one. told: log-probabilities of its prompt."""
        request, first = work.sequence.request, work.sequence.generated
        state = self._sampling[request.request_id]
        prompt: tuple[TokenLogprobs | None, ...] = told
        prompt_first = state.prompt_logprobs_told
        if request.sampling.prompt_logprobs is not None and state.prompt_logprobs_told == 0:
            prompt = (None, *told)
        state.prompt_logprobs_told += len(prompt)
        finish = self._scheduler.advance(work, token.token_id if token else None, self._eos_token_ids)
        if finish is not None:
            self._forget(request.request_id, finish.value, time.perf_counter())
        if token is None:
            if not prompt:
                return None
            return TokenDelta(request.request_id, prompt_logprobs=prompt, first=first, prompt_first=prompt_first)
        state.append(token.token_id)
        return TokenDelta(
            request.request_id,
            (token.token_id,),
            () if token.logprobs is None else (token.logprobs,),
            finish,
            prompt_logprobs=prompt,
            cached_tokens=(work.sequence.cached_tokens or 0) if first == 0 else 0,
            first=first,
            prompt_first=prompt_first,
        )

    def _fail(self, request_ids: Sequence[str], error: RequestError) -> list[TokenDelta]:
        now_s, ending = time.perf_counter(), "deadline" if isinstance(error, DeadlineExceeded) else "error"
        for request_id in request_ids:
            self._scheduler.remove(request_id)
            self._forget(request_id, ending, now_s)
        return [TokenDelta(request_id, error=error) for request_id in request_ids]

    def _forget(self, request_id: str, ending: str, now_s: float) -> None:
        self._sampling.pop(request_id, None)
        self._counts.requests.end(request_id, ending, now_s)

    def _request_ids(self, works: Sequence[Work]) -> list[str]:
        """Of those that have not ended meanwhile."""
        return [work.sequence.request.request_id for work in works if self._scheduler.runs(work.sequence)]

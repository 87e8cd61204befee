"""The loop that serves: schedule, forward, sample, emit."""

import logging
import time
from collections.abc import Sequence

from router.counts.requests import CANCELLED, STEP_BOUNDS_S, EngineSnapshot, EngineStats, Histogram, RequestMetrics
from router.errors import DeadlineExceeded, RequestError, ResourceExhausted, Unavailable
from router.model.dispatch import ShardUnavailable
from router.model.kv_cache import Span
from router.model.llama4 import Model
from router.request import GenerationRequest, TokenDelta, TokenLogprobs, request_limits
from router.sampling.logprobs import token_logprobs
from router.sampling.sampler import SampledToken, sample
from router.sampling.state import SamplingState
from router.schedule.kv_layout import KvLayout
from router.schedule.limits import SchedulerLimits
from router.schedule.scheduler import Scheduler
from router.schedule.sequence import Work

logger = logging.getLogger(__name__)

# Logits of a prompt that exist at once. 64 rows of 202,048 in fp32 are 52 MB.
PROMPT_LOGIT_ROWS = 64


class Engine:
    """One router's requests, from submission to the last token. Not thread-safe: one thread owns it."""

    def __init__(
        self,
        model: Model,
        limits: SchedulerLimits,
        max_context_tokens: int | None = None,
        layout: KvLayout | None = None,
    ) -> None:
        """max_context_tokens: prompt and completion together; none means all positions that the model has.
        layout: of the KV cache; none means the model's."""
        self.request_limits = request_limits(model.config, max_context_tokens)
        self.threads = model.threads
        self._model = model
        self._eos_token_ids = frozenset(model.config.eos_token_ids)
        layout = layout or model.kv_layout
        self._scheduler = Scheduler(limits, layout, time.monotonic)
        self._cache = model.new_cache(layout, self._scheduler.pool.num_units, limits.max_running)
        self._sampling: dict[str, SamplingState] = {}
        self._prompt_tokens = self._generated_tokens = self._steps = 0
        self._requests = RequestMetrics()
        self._step_s = Histogram(STEP_BOUNDS_S)

    @property
    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            self._prompt_tokens,
            self._generated_tokens,
            self._steps,
            scheduler.num_running,
            scheduler.num_waiting,
            scheduler.kv_bytes_used,
            scheduler.kv_bytes_cached,
            scheduler.kv_bytes_total,
            scheduler.counters.prefix_queried_tokens,
            scheduler.counters.prefix_hit_tokens,
            scheduler.counters.preemptions,
        )

    @property
    def snapshot(self) -> EngineSnapshot:
        """Everything that is counted; from any one thread."""
        load = self._model.expert_load
        return EngineSnapshot(
            self.stats,
            self._requests.copy(),
            self._step_s.copy(),
            dict(self._model.clock.seconds),
            tuple(load.rows_of_shard),
            load.summary(),
        )

    @property
    def has_work(self) -> bool:
        return self._scheduler.num_running + self._scheduler.num_waiting > 0

    def submit(self, request: GenerationRequest, arrived_s: float | None = None) -> None:
        """Queue a request that `check_request` has passed. Raises ResourceExhausted.

        arrived_s: when it came, by time.perf_counter; none means now.
        """
        try:
            self._scheduler.enqueue(request)
        except ResourceExhausted:
            self._requests.refused()
            raise
        arrived_s = time.perf_counter() if arrived_s is None else arrived_s
        self._requests.arrived(request.request_id, arrived_s, len(request.prompt_token_ids))
        self._sampling[request.request_id] = SamplingState(
            request.sampling, request.prompt_token_ids, self._eos_token_ids
        )

    def cancel(self, request_id: str, ending: str = CANCELLED) -> None:
        """Forget a request and free its memory; no delta follows. One that has just ended is ignored.

        ending: how it is counted, one of ENDINGS.
        """
        self._scheduler.remove(request_id)
        self._sampling.pop(request_id, None)
        self._requests.end(request_id, ending, time.perf_counter())

    def step(self) -> list[TokenDelta]:
        """Run one step and return what it added to each request, or why requests had to end."""
        deltas = self._expire()
        clock = self._model.clock
        clock.start()
        self._model.expert_load.start_step()
        work = self._scheduler.schedule()
        if not work:
            return deltas
        started_s = time.perf_counter()
        clock.mark(("other", started_s))
        self._requests.started(_request_ids(work), started_s)
        try:
            sampled, prompt_entries = self._forward(work)
        except ShardUnavailable as error:
            self._step_s.observe(clock.stop())
            return deltas + self._fail(_request_ids(work), Unavailable(str(error)))
        except Exception:
            # A defect, or memory that ran out: it must not take the other requests' server down.
            self._step_s.observe(clock.stop())
            logger.exception("a step failed")
            return deltas + self._fail(_request_ids(work), Unavailable("the router failed in a step; its log says why"))
        deltas += self._emit(work, sampled, prompt_entries)
        self._scheduler.record_step(work, time.perf_counter() - started_s)
        self._model.expert_load.end_step()
        self._step_s.observe(clock.stop())
        return deltas

    def fail_all(self, error: RequestError) -> list[TokenDelta]:
        """End every request, waiting or running, with `error`."""
        return self._fail(self._scheduler.request_ids, error)

    def _forward(self, work: Sequence[Work]) -> tuple[list[SampledToken], list[TokenLogprobs]]:
        """The new token of each item that samples, and the log-probabilities of prompts that were asked for."""
        token_ids: list[int] = []
        spans, last_rows, states, positions = [], [], [], []
        prompt_rows: list[int] = []
        next_ids: list[int] = []
        tops: list[int] = []
        for item in work:
            sequence, request = item.sequence, item.sequence.request
            places, top = self._prompt_places(item), request.sampling.prompt_logprobs
            if places and top is not None:
                prompt_rows += [len(token_ids) + place - 1 - item.first for place in places]
                next_ids += request.prompt_token_ids[places.start : places.stop]
                tops += [top] * len(places)
            self._cache.assign(sequence.table_row, item.new_entries)
            token_ids += sequence.token_ids[item.first : item.first + item.length]
            spans.append(Span(sequence.table_row, item.first, item.length))
            if item.samples:
                last_rows.append(len(token_ids) - 1)
                states.append(self._sampling[request.request_id])
                positions.append(item.first + item.length)
        x_RD = self._model.forward(token_ids, spans, self._cache, last_rows + prompt_rows)
        self._model.clock.mark(("sample", time.perf_counter()))
        sampled = sample(self._model.logits(x_RD[: len(last_rows)]), states, positions) if last_rows else []
        entries: list[TokenLogprobs] = []
        for first in range(0, len(prompt_rows), PROMPT_LOGIT_ROWS):
            rows = slice(first, first + PROMPT_LOGIT_ROWS)
            logits_RV = self._model.logits(x_RD[len(last_rows) :][rows])
            entries += token_logprobs(logits_RV, next_ids[rows], tops[rows])
        return sampled, entries

    def _prompt_places(self, item: Work) -> range:
        """The prompt's positions whose log-probabilities `item` is the first to tell; position 0 has none."""
        request = item.sequence.request
        if request.sampling.prompt_logprobs is None:
            return range(0)
        told = self._sampling[request.request_id].prompt_logprobs_told
        return range(max(item.first + 1, told), min(item.first + item.length + 1, len(request.prompt_token_ids)))

    def _emit(
        self, work: Sequence[Work], sampled: Sequence[SampledToken], entries: Sequence[TokenLogprobs]
    ) -> list[TokenDelta]:
        deltas, tokens, next_entries = [], iter(sampled), iter(entries)
        now_s = time.perf_counter()
        self._model.clock.mark(("other", now_s))
        self._requests.made([item.sequence.request.request_id for item in work if item.samples], now_s)
        self._steps += 1
        for item in work:
            request = item.sequence.request
            state = self._sampling[request.request_id]
            self._prompt_tokens += max(0, min(item.first + item.length, len(request.prompt_token_ids)) - item.first)
            prompt: tuple[TokenLogprobs | None, ...] = tuple(next(next_entries) for _ in self._prompt_places(item))
            if request.sampling.prompt_logprobs is not None and state.prompt_logprobs_told == 0:
                prompt = (None, *prompt)
            state.prompt_logprobs_told += len(prompt)
            token = next(tokens) if item.samples else None
            finish = self._scheduler.advance(item, token.token_id if token else None, self._eos_token_ids)
            if token is not None:
                self._generated_tokens += 1
                state.append(token.token_id)
            if finish is not None:
                del self._sampling[request.request_id]
                self._requests.end(request.request_id, finish.value, now_s)
            if token is not None or prompt:
                made = () if token is None else (token.token_id,)
                logprobs = () if token is None or token.logprobs is None else (token.logprobs,)
                cached = (item.sequence.cached_tokens or 0) if item.sequence.generated == 1 else 0
                deltas.append(TokenDelta(request.request_id, made, logprobs, finish, None, prompt, cached))
        return deltas

    def _expire(self) -> list[TokenDelta]:
        error = DeadlineExceeded("the request's deadline passed before it was done")
        return self._fail(self._scheduler.expired(), error)

    def _fail(self, request_ids: Sequence[str], error: RequestError) -> list[TokenDelta]:
        now_s, ending = time.perf_counter(), "deadline" if isinstance(error, DeadlineExceeded) else "error"
        for request_id in request_ids:
            self._scheduler.remove(request_id)
            self._sampling.pop(request_id, None)
            self._requests.end(request_id, ending, now_s)
        return [TokenDelta(request_id, error=error) for request_id in request_ids]


def _request_ids(work: Sequence[Work]) -> list[str]:
    return [item.sequence.request.request_id for item in work]

"""The loop that serves: schedule, forward, sample, emit."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from checkpoint.config import ModelConfig
from router.dispatch import ShardUnavailable
from router.errors import DeadlineExceeded, RequestError, Unavailable
from router.kv_cache import Span
from router.kv_layout import MAX_BLOCK_TOKENS, KvLayout
from router.model import Model
from router.request import GenerationRequest, RequestLimits, TokenDelta
from router.sampler import SampledToken, sample
from router.scheduler import Scheduler, SchedulerLimits, Work

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start, and the state now. Bytes are of the KV cache."""

    prompt_tokens: int
    generated_tokens: int
    steps: int
    running: int
    waiting: int
    kv_bytes_used: int
    kv_bytes_total: int


class Engine:
    """One router's requests, from submission to the last token. Not thread-safe: one thread owns it."""

    def __init__(
        self,
        model: Model,
        limits: SchedulerLimits,
        max_context_tokens: int | None = None,
        max_block_tokens: int = MAX_BLOCK_TOKENS,
    ) -> None:
        """max_context_tokens: prompt and completion together; none means all positions that the model has.
        max_block_tokens: see KvLayout."""
        self.request_limits = request_limits(model.config, max_context_tokens)
        self._model = model
        self._eos_token_ids = frozenset(model.config.eos_token_ids)
        layout = KvLayout.of(model.config, model.dtype.itemsize, max_block_tokens)
        self._scheduler = Scheduler(limits, layout)
        self._cache = model.new_cache(layout, self._scheduler.pool.num_units, limits.max_running)
        self._prompt_tokens = self._generated_tokens = self._steps = 0

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
            scheduler.limits.kv_bytes,
        )

    @property
    def has_work(self) -> bool:
        return self._scheduler.num_running + self._scheduler.num_waiting > 0

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request that `check_request` has passed. Raises ResourceExhausted."""
        self._scheduler.add(request)

    def cancel(self, request_id: str) -> None:
        """Forget a request and free its memory; no delta follows. One that has just ended is ignored."""
        self._scheduler.remove(request_id)

    def step(self) -> list[TokenDelta]:
        """Run one step and return what it added to each request, or why requests had to end."""
        deltas = self._expire()
        work = self._scheduler.schedule()
        if not work:
            return deltas
        started_s = time.perf_counter()
        try:
            sampled = self._forward(work)
        except ShardUnavailable as error:
            return deltas + self._fail(_request_ids(work), Unavailable(str(error)))
        except Exception:
            # A defect, or memory that ran out: it must not take the other requests' server down.
            logger.exception("a step failed")
            return deltas + self._fail(_request_ids(work), Unavailable("the router failed in a step; its log says why"))
        deltas += self._emit(work, sampled)
        self._scheduler.record_step(work, time.perf_counter() - started_s)
        return deltas

    def fail_all(self, error: RequestError) -> list[TokenDelta]:
        """End every request, waiting or running, with `error`."""
        return self._fail(self._scheduler.request_ids, error)

    def _forward(self, work: Sequence[Work]) -> list[SampledToken]:
        token_ids: list[int] = []
        spans, rows, sampling, positions = [], [], [], []
        for item in work:
            sequence = item.sequence
            self._cache.assign(sequence.row, item.new_entries)
            token_ids += sequence.token_ids[item.first : item.first + item.length]
            spans.append(Span(sequence.row, item.first, item.length))
            if item.samples:
                rows.append(len(token_ids) - 1)
                sampling.append(sequence.request.sampling)
                positions.append(item.first + item.length)
        x_RD = self._model.forward(token_ids, spans, self._cache, rows)
        return sample(self._model.logits(x_RD), sampling, positions) if rows else []

    def _emit(self, work: Sequence[Work], sampled: Sequence[SampledToken]) -> list[TokenDelta]:
        deltas, tokens = [], iter(sampled)
        self._steps += 1
        for item in work:
            request = item.sequence.request
            self._prompt_tokens += max(0, min(item.first + item.length, len(request.prompt_token_ids)) - item.first)
            token = next(tokens) if item.samples else None
            finish = self._scheduler.advance(item, token.token_id if token else None, self._eos_token_ids)
            if token is not None:
                self._generated_tokens += 1
                logprobs = () if token.logprobs is None else (token.logprobs,)
                cached = (item.sequence.cached_tokens or 0) if item.sequence.generated == 1 else 0
                deltas.append(TokenDelta(request.request_id, (token.token_id,), logprobs, finish, cached_tokens=cached))
        return deltas

    def _expire(self) -> list[TokenDelta]:
        error = DeadlineExceeded("the request's deadline passed before it was done")
        return self._fail(self._scheduler.expired(), error)

    def _fail(self, request_ids: Sequence[str], error: RequestError) -> list[TokenDelta]:
        for request_id in request_ids:
            self._scheduler.remove(request_id)
        return [TokenDelta(request_id, error=error) for request_id in request_ids]


def _request_ids(work: Sequence[Work]) -> list[str]:
    return [item.sequence.request.request_id for item in work]


def request_limits(config: ModelConfig, max_context_tokens: int | None = None) -> RequestLimits:
    """What a router of this model takes; see Engine for max_context_tokens."""
    positions = config.max_position_embeddings
    return RequestLimits(config.vocab_size, min(positions, max_context_tokens or positions))

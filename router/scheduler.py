"""Which tokens go into the next step: queues and byte counts only, no tensors, no RPC, no clock.

Every running sequence that has its prompt behind it gets one token per step; what is left of the step's token budget
goes to prompts, oldest first, in pieces. A sequence's whole KV cache is reserved when it is admitted, so a running
request never runs out of memory.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from router.errors import ResourceExhausted
from router.request import FinishReason, GenerationRequest

Cache = TypeVar("Cache")


@dataclass(frozen=True)
class SchedulerLimits:
    """max_step_tokens: tokens in one step, prompts and decoding together; also the most rows a link must carry
    per expert chosen. kv_bytes: KV cache of all running sequences together."""

    max_running: int
    max_waiting: int
    max_step_tokens: int
    kv_bytes: int


@dataclass
class SequenceState(Generic[Cache]):
    """A request on its way. computed: how many of token_ids are in the cache."""

    request: GenerationRequest
    token_ids: list[int]
    kv_bytes: int
    cache: Cache | None = None
    computed: int = 0

    @property
    def generated(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)


@dataclass(frozen=True)
class Work(Generic[Cache]):
    """Tokens first..first+length-1 of a sequence. samples: the last of them is followed by a new token."""

    sequence: SequenceState[Cache]
    first: int
    length: int

    @property
    def samples(self) -> bool:
        return self.first + self.length == len(self.sequence.token_ids)


@dataclass
class Scheduler(Generic[Cache]):
    """kv_bytes_of: KV bytes of one sequence of so many tokens. new_cache: makes the cache of an admitted sequence."""

    limits: SchedulerLimits
    kv_bytes_of: Callable[[int], int]
    new_cache: Callable[[int], Cache]
    _waiting: "OrderedDict[str, SequenceState[Cache]]" = field(default_factory=OrderedDict)
    _running: "OrderedDict[str, SequenceState[Cache]]" = field(default_factory=OrderedDict)
    kv_bytes_used: int = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def request_ids(self) -> list[str]:
        """All requests, running ones first."""
        return [*self._running, *self._waiting]

    def add(self, request: GenerationRequest) -> None:
        """Queue a request. Raises ResourceExhausted if the queue is full or the request can never fit."""
        assert request.request_id not in self.request_ids
        positions = len(request.prompt_token_ids) + request.sampling.max_tokens
        kv_bytes = self.kv_bytes_of(positions)
        if kv_bytes > self.limits.kv_bytes:
            raise ResourceExhausted(
                f"prompt and max_tokens come to {positions} tokens, whose KV cache needs {kv_bytes} bytes; the server "
                f"has {self.limits.kv_bytes} (engine.kv_bytes)"
            )
        if len(self._waiting) >= self.limits.max_waiting:
            raise ResourceExhausted(
                f"{len(self._waiting)} requests are waiting already (engine.max_waiting); try again later"
            )
        self._waiting[request.request_id] = SequenceState(request, list(request.prompt_token_ids), kv_bytes)

    def remove(self, request_id: str) -> bool:
        """Forget a request, waiting or running, and free its memory; False if it is unknown."""
        if self._waiting.pop(request_id, None) is not None:
            return True
        sequence = self._running.pop(request_id, None)
        if sequence is None:
            return False
        self.kv_bytes_used -= sequence.kv_bytes
        sequence.cache = None
        return True

    def schedule(self) -> list[Work[Cache]]:
        """The next step's work, decoding sequences first; empty if there is nothing to do.

        Raises what new_cache raises; the request whose turn it was is then still the first of those waiting.
        """
        self._admit()
        budget = self.limits.max_step_tokens
        # A prompt of one token is no decoding: a stream of these could keep an older, longer prompt waiting for ever.
        decoding = [s for s in self._running.values() if s.generated]
        prefilling = [s for s in self._running.values() if not s.generated]
        work = []
        for sequence in decoding + prefilling:
            length = min(len(sequence.token_ids) - sequence.computed, budget)
            if length:
                work.append(Work(sequence, sequence.computed, length))
                budget -= length
        return work

    def advance(self, work: Work[Cache], token_id: int | None, eos_token_ids: frozenset[int]) -> FinishReason | None:
        """Record that `work` is done and, if it samples, which token came of it; a finished request is forgotten."""
        sequence, sampling = work.sequence, work.sequence.request.sampling
        sequence.computed = work.first + work.length
        assert work.samples == (token_id is not None)
        if token_id is None:
            return None
        sequence.token_ids.append(token_id)
        finish = None
        if token_id in sampling.stop_token_ids or (token_id in eos_token_ids and not sampling.ignore_eos):
            finish = FinishReason.STOP
        elif sequence.generated >= sampling.max_tokens:
            finish = FinishReason.LENGTH
        if finish is not None:
            self.remove(sequence.request.request_id)
        return finish

    def _admit(self) -> None:
        # First come, first served: a large request at the head waits for room, and is not overtaken for ever.
        while self._waiting and len(self._running) < self.limits.max_running:
            request_id, sequence = next(iter(self._waiting.items()))
            if self.kv_bytes_used + sequence.kv_bytes > self.limits.kv_bytes:
                return
            positions = len(sequence.request.prompt_token_ids) + sequence.request.sampling.max_tokens
            sequence.cache = self.new_cache(positions)  # first, because it may raise
            del self._waiting[request_id]
            self.kv_bytes_used += sequence.kv_bytes
            self._running[request_id] = sequence

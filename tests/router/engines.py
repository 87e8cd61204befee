"""Engines over a real model, schedulers over none, requests for them, and what comes out."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

from router.engine import Engine
from router.errors import ResourceExhausted
from router.model.llama4 import Model
from router.request import FinishReason, GenerationRequest, SamplingParams, TokenDelta
from router.runner import LocalRunner, MakeRunner
from router.schedule.block_table import TableEntry
from router.schedule.kv_layout import KvLayout
from router.schedule.scheduler import Scheduler, SchedulerCounters, SchedulerLimits
from router.schedule.sequence import Work
from tests.reference import prompt

NUM_SHARDS = 3
MANY_STEPS = 2000


def make_engine(
    model: Model,
    *,
    max_running: int = 8,
    max_waiting: int = 100,
    max_step_tokens: int = 64,
    kv_positions: int = 2000,
    max_block_tokens: int = 4,
    prefix_cache: bool = True,
    clock: Callable[[], float] | None = None,
    make_runner: MakeRunner = LocalRunner,
) -> Engine:
    """kv_positions: memory for one sequence of so many tokens. clock: for deadlines."""
    layout = KvLayout.of(model.config, model.dtype.itemsize, max_block_tokens)
    kv_bytes = layout.units(kv_positions) * layout.unit_bytes
    limits = SchedulerLimits(max_running, max_waiting, max_step_tokens, kv_bytes, prefix_cache)
    engine = Engine(model, limits, layout=layout, make_runner=make_runner)
    if clock is not None:
        engine._scheduler.clock = clock
    return engine


def counters_of(engine: Engine) -> SchedulerCounters:
    return engine._scheduler.counters


def greedy(name: str, prompt_token_ids: Iterable[int], max_tokens: int = 12, **sampling: Any) -> GenerationRequest:
    params = SamplingParams(max_tokens, **{"temperature": 0.0, **sampling})
    return GenerationRequest(name, tuple(prompt_token_ids), params)


def drawn(name: str, prompt_token_ids: Iterable[int], max_tokens: int = 12, **sampling: Any) -> GenerationRequest:
    return greedy(name, prompt_token_ids, max_tokens, **{"temperature": 1.0, "seed": 20260401, **sampling})


def run_to_end(engine: Engine) -> list[TokenDelta]:
    """All deltas of all requests, in order."""
    deltas = []
    for _ in range(MANY_STEPS):
        if not engine.has_work:
            return deltas
        deltas += engine.step()
    raise AssertionError(f"not done after {MANY_STEPS} steps")


def tokens_of(deltas: Iterable[TokenDelta], name: str) -> list[int]:
    return [token_id for delta in deltas if delta.request_id == name for token_id in delta.token_ids]


def finish_of(deltas: Iterable[TokenDelta], name: str) -> FinishReason | None:
    [last] = [delta for delta in deltas if delta.request_id == name and delta.is_last]
    return last.finish_reason


def alone(model: Model, request: GenerationRequest) -> list[int]:
    engine = make_engine(model)
    engine.submit(request)
    return tokens_of(run_to_end(engine), request.request_id)


COMPANY = [
    greedy(f"{length} tokens", prompt(length, seed=length), max_tokens)
    for length, max_tokens in ((1, 20), (5, 3), (16, 12), (17, 1), (40, 12), (33, 7))
]


# Schedulers.


@dataclass
class FakeClock:
    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


EOS, STOP_TOKEN, WORD = 0, 1, 2


def layout_of(global_units: int, chunked_units: int, block_tokens: int = 2, chunk_tokens: int = 8) -> KvLayout:
    """A layout of no particular model, in units of 10 bytes."""
    return KvLayout(block_tokens, chunk_tokens, global_units, chunked_units, 1, 10, ())


PLAIN = layout_of(global_units=1, chunked_units=0, chunk_tokens=64)
"""A block of 2 tokens takes 1 unit."""

LIKE_SCOUT = layout_of(global_units=1, chunked_units=3)
"""A block of 2 tokens takes 4 units; every 8 tokens, when a chunk ends, 3 of each are given back."""


def make_scheduler(
    *,
    layout: KvLayout = PLAIN,
    max_running: int = 8,
    max_waiting: int = 100,
    max_step_tokens: int = 64,
    kv_units: int = 10_000,
    prefix_cache: bool = True,
    prefill_slowdown: float | None = None,
    clock: Callable[[], float] | None = None,
) -> Scheduler:
    kv_bytes = kv_units * layout.unit_bytes
    limits = SchedulerLimits(max_running, max_waiting, max_step_tokens, kv_bytes, prefix_cache, prefill_slowdown)
    return Scheduler(limits, layout, clock or FakeClock())


def request(
    name: str,
    prompt_tokens: int | Iterable[int] = 3,
    max_tokens: int = 4,
    timeout_s: float | None = None,
    **sampling: Any,
) -> GenerationRequest:
    """prompt_tokens: these, or so many that no other name's prompt has."""
    if isinstance(prompt_tokens, int):
        prompt_tokens = [crc32(name.encode())] * prompt_tokens
    stop_token_ids = frozenset({STOP_TOKEN})
    params = SamplingParams(max_tokens, stop_token_ids=stop_token_ids, **sampling)
    return GenerationRequest(name, tuple(prompt_tokens), params, timeout_s)


def name_of(work: Work) -> str:
    return work.sequence.request.request_id


def run_step(scheduler: Scheduler, token_id: int = WORD) -> list[tuple[str, int, int]]:
    """One step in which every sequence that samples draws token_id; gives (request, first token, length)."""
    works = scheduler.schedule()
    for work in works:
        scheduler.advance(work, token_id if work.samples else None, frozenset({EOS}))
    return [(name_of(work), work.first, work.length) for work in works]


def run_steps(scheduler: Scheduler) -> list[list[tuple[str, int, int]]]:
    """Steps until every request has ended."""
    steps = []
    while scheduler.request_ids:
        steps.append(run_step(scheduler))
        assert len(steps) < MANY_STEPS
    return steps


# Random traffic for schedulers.


@dataclass(frozen=True)
class Arrival:
    """ends_after: the request draws an end token in this place, if max_tokens lets it come so far."""

    prompt: tuple[int, ...]
    max_tokens: int
    ends_after: int
    timeout_s: float | None = None

    @property
    def positions(self) -> int:
        return len(self.prompt) + self.max_tokens

    def answer(self) -> list[int]:
        token_ids = list(self.prompt)
        for nth in range(1, min(self.max_tokens, self.ends_after) + 1):
            token_ids.append(EOS if nth == self.ends_after else next_token(token_ids))
        return token_ids[len(self.prompt) :]


def next_token(token_ids: Iterable[int]) -> int:
    """One of two; so that answers go on like other requests' prompts."""
    return 2 + hash(tuple(token_ids)) % 2


@dataclass(frozen=True)
class Cancellation:
    """nth: of all requests that were accepted so far, modulo their number."""

    nth: int


Event = Arrival | Cancellation | None  # None: a step, one second long


@dataclass(frozen=True)
class Piece:
    """A Work as it was when it was scheduled; token_ids: up to its last token."""

    name: str
    table_row: int
    first: int
    token_ids: tuple[int, ...]
    samples: bool
    new_entries: tuple[TableEntry, ...]

    @property
    def length(self) -> int:
        return len(self.token_ids) - self.first


@dataclass(frozen=True)
class Step:
    """running, waiting: who does when the step has been scheduled."""

    pieces: list[Piece]
    running: list[str]
    waiting: list[str]
    used_units: int
    now_s: float


@dataclass
class Traffic:
    """Plays events against a scheduler and notes what happens. A request's name is the number of its arrival."""

    scheduler: Scheduler
    clock: FakeClock
    accepted: dict[str, Arrival] = field(default_factory=dict)
    deadline_s: dict[str, float] = field(default_factory=dict)
    sampled: dict[str, list[int]] = field(default_factory=dict)
    ends: list[str] = field(default_factory=list)
    stopped: set[str] = field(default_factory=set)
    steps: list[Step] = field(default_factory=list)

    def play(self, event: Event) -> None:
        match event:
            case Arrival():
                self.arrive(event)
            case Cancellation(nth):
                if self.accepted:
                    self.stop(list(self.accepted)[nth % len(self.accepted)])
            case None:
                self.step()

    def arrive(self, arrival: Arrival) -> None:
        name = str(len(self.accepted))
        try:
            self.scheduler.enqueue(request(name, arrival.prompt, arrival.max_tokens, arrival.timeout_s))
        except ResourceExhausted:
            return
        self.accepted[name], self.sampled[name] = arrival, []
        if arrival.timeout_s is not None:
            self.deadline_s[name] = self.clock.now_s + arrival.timeout_s

    def stop(self, name: str) -> None:
        if self.scheduler.remove(name):
            self.ends.append(name)
            self.stopped.add(name)

    def step(self) -> None:
        scheduler = self.scheduler
        self.clock.now_s += 1.0
        for name in scheduler.expired():
            self.stop(name)
        works = scheduler.schedule()
        pieces = []
        for work in works:
            sequence, end = work.sequence, work.first + work.length
            token_ids = tuple(sequence.token_ids[:end])
            pieces.append(
                Piece(name_of(work), sequence.table_row, work.first, token_ids, work.samples, work.new_entries)
            )
        running, waiting = (
            scheduler.request_ids[: scheduler.num_running],
            scheduler.request_ids[scheduler.num_running :],
        )
        self.steps.append(Step(pieces, running, waiting, scheduler.pool.used_units, self.clock.now_s))
        for work, piece in zip(works, pieces, strict=True):
            token_id = self.sample(piece) if work.samples else None
            if scheduler.advance(work, token_id, frozenset({EOS})) is not None:
                self.ends.append(piece.name)
        scheduler.record_step(works, sum(piece.length for piece in pieces) / 1000)

    def sample(self, piece: Piece) -> int:
        sampled = self.sampled[piece.name]
        is_end = len(sampled) + 1 == self.accepted[piece.name].ends_after
        sampled.append(EOS if is_end else next_token(piece.token_ids))
        return sampled[-1]

    def drain(self) -> "Traffic":
        """Step until every request has ended, or nothing happens any more."""
        while self.scheduler.request_ids:
            self.step()
            if not self.steps[-1].pieces:
                break
        return self


def grown(token_ids: Sequence[int], length: int) -> tuple[int, ...]:
    token_ids = list(token_ids)
    while len(token_ids) < length:
        token_ids.append(next_token(token_ids))
    return tuple(token_ids)

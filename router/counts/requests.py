"""What an engine counts, as plain data without Prometheus. It can be sent to other processes.

One thread counts; any thread may take a snapshot. Each number is right by itself, but two may be
one step apart.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from router.counts.expert_load import ExpertLoadSummary
from router.counts.step_clock import Phase
from router.request import REPLAY_REASONS

# How a request can end: the values of FinishReason, and the other ways.
CANCELLED = "cancelled"
MOVED = "moved"  # to another router
ENDINGS = ("stop", "length", CANCELLED, MOVED, "deadline", "refused", "error")

# Upper bounds of buckets, in seconds. A token takes from below a millisecond (a tiny model) to
# seconds (a large one beside long prompts). A request takes from one such step to many minutes.
STEP_BOUNDS_S = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5, 10.0,
)  # fmt: skip
WAIT_BOUNDS_S = (
    0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 60.0, 240.0,
)  # fmt: skip
REQUEST_BOUNDS_S = (0.01, 0.03, 0.1, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 960.0, 1920.0)
# In tokens.
LENGTH_BOUNDS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)


class Histogram:
    """counts[i]: observed values above bounds[i - 1] and at most bounds[i].

    The last entry: values above all bounds.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    @property
    def count(self) -> int:
        """Values observed."""
        return sum(self.counts)

    def copy(self) -> "Histogram":
        copied = Histogram(self.bounds)
        copied.counts, copied.sum = list(self.counts), self.sum
        return copied


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start, and the current state.

    prompt_tokens: prompt tokens computed. Tokens recomputed after a preemption count again; those
    found in the prefix cache do not count.
    kv_bytes_used, kv_bytes_cached, kv_bytes_total: KV cache held by running requests, kept as
    prefix cache, and all.
    prefix_queried_tokens, prefix_hit_tokens: prompt tokens looked up in the prefix cache, and found.
    replayed: requests taken over, which another router or an earlier process had.
    """

    prompt_tokens: int
    generated_tokens: int
    steps: int
    running: int
    waiting: int
    kv_bytes_used: int
    kv_bytes_cached: int
    kv_bytes_total: int
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    replayed: int

    def fullness(self, max_running: int) -> float:
        """How full the engine is: of requests or of KV cache, whichever is more; above 1 there is a queue.

        Example: 6 running and 2 waiting of max_running 4, with half of the cache in use, are 2.
        """
        return max((self.running + self.waiting) / max_running, self.kv_bytes_used / max(self.kv_bytes_total, 1))


@dataclass
class _Times:
    """Times of one request, in seconds of one clock.

    last_s: of its newest token. tokens: made so far.
    """

    arrived_s: float
    started_s: float | None = None
    last_s: float | None = None
    tokens: int = 0


@dataclass
class RequestMetrics:
    """Times and lengths of all requests, from arrival to end.

    Histograms are in seconds, lengths in tokens.

    ended: requests by ending, one of ENDINGS.
    replayed: requests that arrived again, by reason, one of REPLAY_REASONS.
    """

    ended: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ENDINGS, 0))
    replayed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REPLAY_REASONS, 0))
    queue_s: Histogram = field(default_factory=lambda: Histogram(WAIT_BOUNDS_S))
    first_token_s: Histogram = field(default_factory=lambda: Histogram(WAIT_BOUNDS_S))
    inter_token_s: Histogram = field(default_factory=lambda: Histogram(STEP_BOUNDS_S))
    request_s: Histogram = field(default_factory=lambda: Histogram(REQUEST_BOUNDS_S))
    prompt_length: Histogram = field(default_factory=lambda: Histogram(LENGTH_BOUNDS))
    generation_length: Histogram = field(default_factory=lambda: Histogram(LENGTH_BOUNDS))
    _live: dict[str, _Times] = field(default_factory=dict)

    def arrived(self, request_id: str, now_s: float, prompt_tokens: int, replayed: str = "") -> None:
        """A request that arrived at `now_s` was accepted.

        replayed: why it came again, one of REPLAY_REASONS; empty if it is new.
        """
        if replayed:
            self.replayed[replayed] += 1
        self.prompt_length.observe(prompt_tokens)
        self._live[request_id] = _Times(now_s)

    def refused(self) -> None:
        """A request was not accepted."""
        self.ended["refused"] += 1

    def started(self, request_ids: Sequence[str], now_s: float) -> None:
        """A step that began at `now_s` computes these requests. For some it may be the first."""
        for request_id in request_ids:
            times = self._live[request_id]
            if times.started_s is None:
                times.started_s = now_s
                self.queue_s.observe(now_s - times.arrived_s)

    def made(self, request_ids: Sequence[str], now_s: float) -> None:
        """The step that ended at `now_s` made a token for each of these requests."""
        since: dict[float, int] = {}  # tokens by the time of the one before; most are from the same step
        for request_id in request_ids:
            times = self._live[request_id]
            times.tokens += 1
            if times.last_s is None:
                self.first_token_s.observe(now_s - times.arrived_s)
            else:
                since[times.last_s] = since.get(times.last_s, 0) + 1
            times.last_s = now_s
        for last_s, tokens in since.items():
            self.inter_token_s.observe(now_s - last_s, tokens)

    def end(self, request_id: str, ending: str, now_s: float) -> None:
        """The request has ended. ending: one of ENDINGS. An unknown request is ignored."""
        times = self._live.pop(request_id, None)
        if times is None:
            return
        self.ended[ending] += 1
        self.request_s.observe(now_s - times.arrived_s)
        self.generation_length.observe(times.tokens)

    def copy(self) -> "RequestMetrics":
        """A copy of the totals, without the requests that still run."""
        histograms = {name: value.copy() for name, value in vars(self).items() if isinstance(value, Histogram)}
        return replace(self, ended=dict(self.ended), replayed=dict(self.replayed), _live={}, **histograms)


@dataclass(frozen=True)
class EngineSnapshot:
    """Everything that an engine counts, at one moment.

    rows_of_shard: rows sent, by shard number. retries: see Asker.retries. slowness: of slow shards.
    """

    stats: EngineStats
    requests: RequestMetrics
    step_s: Histogram
    phase_s: dict[Phase, float]
    rows_of_shard: dict[int, int]
    retries: dict[str, int]
    slowness: dict[int, float]
    expert_load: ExpertLoadSummary | None

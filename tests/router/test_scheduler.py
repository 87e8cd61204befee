"""The scheduler's promises, by example and then over random traffic. Plain Python; a cache is any object."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.errors import ResourceExhausted
from router.request import FinishReason, GenerationRequest, SamplingParams
from router.scheduler import Scheduler, SchedulerLimits, Work

BYTES_PER_POSITION = 10
EOS, STOP_TOKEN, WORD = 0, 1, 2


@dataclass
class FakeCache:
    positions: int


def make_scheduler(
    *, max_running: int = 8, max_waiting: int = 100, max_step_tokens: int = 64, kv_positions: int = 10_000
) -> Scheduler[FakeCache]:
    """kv_positions: how many tokens' keys and values fit into memory."""
    limits = SchedulerLimits(max_running, max_waiting, max_step_tokens, kv_positions * BYTES_PER_POSITION)
    return Scheduler(limits, lambda positions: positions * BYTES_PER_POSITION, FakeCache)


def request(name: str, prompt: int = 3, max_tokens: int = 4) -> GenerationRequest:
    sampling = SamplingParams(max_tokens, stop_token_ids=frozenset({STOP_TOKEN}))
    return GenerationRequest(name, tuple(range(100, 100 + prompt)), sampling)


def name_of(work: Work[FakeCache]) -> str:
    return work.sequence.request.request_id


def run_step(scheduler: Scheduler[FakeCache], token_id: int = WORD) -> list[tuple[str, int, int]]:
    """One step in which every sequence that samples draws token_id; gives (request, first token, length)."""
    work = scheduler.schedule()
    for item in work:
        scheduler.advance(item, token_id if item.samples else None, frozenset({EOS}))
    return [(name_of(item), item.first, item.length) for item in work]


def test_an_idle_scheduler_has_nothing_to_do() -> None:
    scheduler = make_scheduler()
    assert scheduler.schedule() == []
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.kv_bytes_used) == (0, 0, 0)


def test_a_prompt_is_computed_at_once_and_then_token_after_token() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("a", prompt=3, max_tokens=3))
    assert [run_step(scheduler) for _ in range(4)] == [[("a", 0, 3)], [("a", 3, 1)], [("a", 4, 1)], []]


def test_requests_start_in_the_order_of_their_arrival() -> None:
    scheduler = make_scheduler(max_running=2)
    for name in "abcd":
        scheduler.add(request(name, prompt=1, max_tokens=2))
    started = [[name for name, first, _ in run_step(scheduler) if first == 0] for _ in range(4)]
    assert started == [["a", "b"], [], ["c", "d"], []]


def test_a_large_request_is_not_overtaken_by_smaller_ones() -> None:
    scheduler = make_scheduler(kv_positions=20)
    scheduler.add(request("first", prompt=10, max_tokens=2))
    scheduler.add(request("large", prompt=18, max_tokens=1))
    scheduler.add(request("small", prompt=1, max_tokens=1))
    assert run_step(scheduler) == [("first", 0, 10)]  # there is room for `small`, which must not take it
    assert run_step(scheduler) == [("first", 10, 1)]
    assert run_step(scheduler) == [("large", 0, 18)]
    assert run_step(scheduler) == [("small", 0, 1)]


def test_decoding_goes_first_and_prompts_get_what_is_left_of_the_step() -> None:
    scheduler = make_scheduler(max_step_tokens=8)
    scheduler.add(request("decoding", prompt=2))
    run_step(scheduler)
    scheduler.add(request("older", prompt=10))
    scheduler.add(request("younger", prompt=9))
    assert run_step(scheduler) == [("decoding", 2, 1), ("older", 0, 7)]
    assert run_step(scheduler) == [("decoding", 3, 1), ("older", 7, 3), ("younger", 0, 4)]


def test_only_the_last_piece_of_a_prompt_samples() -> None:
    scheduler = make_scheduler(max_step_tokens=4)
    scheduler.add(request("a", prompt=10))
    samples = []
    for _ in range(3):
        [work] = scheduler.schedule()
        samples.append(work.samples)
        scheduler.advance(work, WORD if work.samples else None, frozenset())
    assert samples == [False, False, True]


def test_a_prompt_of_one_token_waits_behind_older_prompts() -> None:
    scheduler = make_scheduler(max_running=3, max_step_tokens=3)
    scheduler.add(request("long", prompt=9))
    scheduler.add(request("short", prompt=1))
    assert [run_step(scheduler) for _ in range(2)] == [[("long", 0, 3)], [("long", 3, 3)]]


def test_the_whole_of_a_requests_memory_is_reserved_while_it_runs() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("a", prompt=3, max_tokens=2))
    assert scheduler.kv_bytes_used == 0  # it waits
    used = []
    for _ in range(2):
        run_step(scheduler)
        used.append(scheduler.kv_bytes_used)
    assert used == [5 * BYTES_PER_POSITION, 0]


def test_a_cache_is_made_for_prompt_and_completion_together() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("a", prompt=3, max_tokens=2))
    [work] = scheduler.schedule()
    assert work.sequence.cache == FakeCache(positions=5)


def test_memory_that_is_used_up_keeps_requests_waiting() -> None:
    scheduler = make_scheduler(kv_positions=10)
    for name in "ab":
        scheduler.add(request(name, prompt=4, max_tokens=2))
    run_step(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)
    run_step(scheduler)
    assert run_step(scheduler) == [("b", 0, 4)]


def test_a_request_that_fills_memory_exactly_is_served() -> None:
    scheduler = make_scheduler(kv_positions=10)
    scheduler.add(request("exact", prompt=6, max_tokens=4))
    assert run_step(scheduler) == [("exact", 0, 6)]


def test_a_request_that_can_never_fit_is_refused_by_name_of_the_limit() -> None:
    scheduler = make_scheduler(kv_positions=10)
    with pytest.raises(ResourceExhausted, match=r"come to 11 tokens.* needs 110 bytes.* has 100 \(engine\.kv_bytes\)"):
        scheduler.add(request("too large", prompt=7, max_tokens=4))
    assert scheduler.request_ids == []


def test_a_full_queue_refuses_by_name_of_the_limit() -> None:
    scheduler = make_scheduler(max_running=1, max_waiting=2)
    scheduler.add(request("running"))
    run_step(scheduler)
    for name in "ab":
        scheduler.add(request(name))
    with pytest.raises(ResourceExhausted, match=r"2 requests are waiting already \(engine\.max_waiting\)"):
        scheduler.add(request("c"))
    assert scheduler.request_ids == ["running", "a", "b"]


@pytest.mark.parametrize(
    ("token_id", "reason"), [(EOS, FinishReason.STOP), (STOP_TOKEN, FinishReason.STOP), (WORD, None)]
)
def test_an_end_token_or_a_stop_token_of_the_request_stops_it(token_id: int, reason: FinishReason | None) -> None:
    scheduler = make_scheduler()
    scheduler.add(request("a"))
    [work] = scheduler.schedule()
    assert scheduler.advance(work, token_id, frozenset({EOS})) is reason
    assert scheduler.num_running == (reason is None)


def test_the_last_allowed_token_ends_a_request_by_length() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("a", max_tokens=2))
    reasons = []
    for _ in range(2):
        [work] = scheduler.schedule()
        reasons.append(scheduler.advance(work, WORD, frozenset({EOS})))
    assert reasons == [None, FinishReason.LENGTH]


def test_an_end_token_in_the_last_place_counts_as_a_stop() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("a", max_tokens=1))
    [work] = scheduler.schedule()
    assert scheduler.advance(work, EOS, frozenset({EOS})) is FinishReason.STOP


def test_a_cancelled_waiting_request_never_starts() -> None:
    scheduler = make_scheduler(max_running=1)
    for name in "abc":
        scheduler.add(request(name, max_tokens=1))
    assert scheduler.remove("b")
    assert [run_step(scheduler) for _ in range(3)] == [[("a", 0, 3)], [("c", 0, 3)], []]


def test_a_cancelled_running_request_frees_its_memory_and_its_place() -> None:
    scheduler = make_scheduler(max_running=1)
    for name in "ab":
        scheduler.add(request(name))
    run_step(scheduler)
    assert scheduler.remove("a")
    assert scheduler.kv_bytes_used == 0
    assert run_step(scheduler) == [("b", 0, 3)]


def test_cancelling_an_unknown_or_finished_request_does_nothing() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("a", max_tokens=1))
    run_step(scheduler)
    assert not scheduler.remove("a")
    assert not scheduler.remove("never heard of")
    assert scheduler.kv_bytes_used == 0


def test_a_request_without_a_cache_keeps_its_place_and_reserves_nothing() -> None:
    def no_memory(positions: int) -> FakeCache:
        raise MemoryError

    scheduler = Scheduler(SchedulerLimits(8, 8, 8, 1000), lambda positions: positions, no_memory)
    scheduler.add(request("a"))
    with pytest.raises(MemoryError):
        scheduler.schedule()
    assert (scheduler.kv_bytes_used, scheduler.num_running, scheduler.request_ids) == (0, 0, ["a"])


# Random traffic.


@dataclass(frozen=True)
class Arrival:
    """ends_after: the request draws an end token in this place, if max_tokens lets it come so far."""

    prompt: int
    max_tokens: int
    ends_after: int

    @property
    def positions(self) -> int:
        return self.prompt + self.max_tokens


@dataclass(frozen=True)
class Cancellation:
    """nth: of all requests that have arrived so far, modulo their number."""

    nth: int


Event = Arrival | Cancellation | None  # None: a step


@dataclass
class Traffic:
    """Plays events against a scheduler and keeps the books that it is checked against."""

    scheduler: Scheduler[FakeCache]
    arrivals: dict[str, Arrival] = field(default_factory=dict)
    computed: dict[str, list[int]] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    deadlines: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    _names: Iterator[int] = field(default_factory=count)

    def play(self, event: Event) -> None:
        match event:
            case Arrival():
                self.arrive(event)
            case Cancellation(nth):
                if self.arrivals:
                    name = list(self.arrivals)[nth % len(self.arrivals)]
                    if self.scheduler.remove(name):
                        self.ends.append(name)
            case None:
                self.step()

    def arrive(self, arrival: Arrival) -> None:
        name = f"{next(self._names)}"
        try:
            self.scheduler.add(request(name, arrival.prompt, arrival.max_tokens))
        except ResourceExhausted:
            return
        self.arrivals[name], self.computed[name] = arrival, []
        alive = [self.arrivals[other].positions for other in self.scheduler.request_ids]
        self.deadlines[name] = self.steps + sum(alive)

    def step(self) -> int:
        """Tokens computed."""
        work = self.scheduler.schedule()
        self.steps += 1
        assert sum(item.length for item in work) <= self.scheduler.limits.max_step_tokens
        assert self.scheduler.num_running <= self.scheduler.limits.max_running
        assert len({name_of(item) for item in work}) == len(work)
        for item in work:
            name = name_of(item)
            if not self.computed[name]:
                self.started.append(name)
            self.computed[name] += range(item.first, item.first + item.length)
            self.sample(item)
        assert 0 <= self.scheduler.kv_bytes_used <= self.scheduler.limits.kv_bytes
        return sum(item.length for item in work)

    def sample(self, item: Work[FakeCache]) -> None:
        name = name_of(item)
        is_end = item.sequence.generated + 1 == self.arrivals[name].ends_after
        token_id = (EOS if is_end else WORD) if item.samples else None
        if self.scheduler.advance(item, token_id, frozenset({EOS})) is not None:
            self.ends.append(name)

    def drain(self) -> None:
        while self.scheduler.request_ids:
            assert self.step() > 0


arrivals = st.builds(Arrival, prompt=st.integers(1, 20), max_tokens=st.integers(1, 10), ends_after=st.integers(1, 12))
traffic_of = st.builds(
    lambda events, **limits: (events, make_scheduler(**limits)),
    events=st.lists(arrivals | st.builds(Cancellation, st.integers(0, 50)) | st.none(), max_size=60),
    max_running=st.integers(1, 6),
    max_waiting=st.integers(1, 12),
    max_step_tokens=st.integers(1, 12),
    kv_positions=st.integers(10, 80),
)
random_traffic = settings(max_examples=150, deadline=None)


def play_all(case: tuple[list[Event], Scheduler[FakeCache]]) -> Traffic:
    """Play every event, then step until nothing is left; each step checks token, request and byte budgets."""
    events, scheduler = case
    traffic = Traffic(scheduler)
    for event in events:
        traffic.play(event)
    traffic.drain()
    return traffic


@random_traffic
@given(traffic_of)
def test_budgets_hold_in_every_step_and_all_memory_comes_back(case: tuple[list[Event], Scheduler[FakeCache]]) -> None:
    assert play_all(case).scheduler.kv_bytes_used == 0


@random_traffic
@given(traffic_of)
def test_every_accepted_request_ends_exactly_once(case: tuple[list[Event], Scheduler[FakeCache]]) -> None:
    traffic = play_all(case)
    assert sorted(traffic.ends) == sorted(traffic.arrivals)


@random_traffic
@given(traffic_of)
def test_tokens_are_computed_exactly_once_and_in_order(case: tuple[list[Event], Scheduler[FakeCache]]) -> None:
    for computed in play_all(case).computed.values():
        assert computed == list(range(len(computed)))


@random_traffic
@given(traffic_of)
def test_no_request_starts_before_an_older_one(case: tuple[list[Event], Scheduler[FakeCache]]) -> None:
    started = [int(name) for name in play_all(case).started]
    assert started == sorted(started)


@random_traffic
@given(traffic_of, arrivals)
def test_nobody_starves_however_many_come_later(
    case: tuple[list[Event], Scheduler[FakeCache]], newcomer: Arrival
) -> None:
    """A request ends within as many steps as it and those before it have tokens, while others keep arriving."""
    events, scheduler = case
    traffic = Traffic(scheduler)
    for event in [*events, *[newcomer, None] * 100]:
        traffic.play(event)
        late = [name for name in scheduler.request_ids if traffic.deadlines[name] < traffic.steps]
        assert not late

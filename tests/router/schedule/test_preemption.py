"""Memory that runs out: who gives way, and then random traffic over pools so small that somebody often has to."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, takewhile
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from router.schedule.kv_layout import KvLayout
from tests.router.engines import (
    Arrival,
    Cancellation,
    Event,
    FakeClock,
    Piece,
    Traffic,
    grown,
    layout_of,
    make_scheduler,
    request,
    run_step,
    run_steps,
)


def pieces_of(name: str, steps: Sequence[Sequence[tuple[str, int, int]]]) -> list[tuple[int, int]]:
    return [(first, length) for step in steps for whose, first, length in step if whose == name]


def test_the_youngest_gives_way_and_the_older_ones_go_on() -> None:
    scheduler = make_scheduler(kv_units=6)
    for name in "abc":
        scheduler.enqueue(request(name, 3, max_tokens=4))  # 2 blocks each, and a third for the fifth token
    steps = [run_step(scheduler) for _ in range(3)]
    assert steps[1:] == [[("a", 3, 1), ("b", 3, 1), ("c", 3, 1)], [("a", 4, 1), ("b", 4, 1)]]
    assert scheduler.counters.preemptions == 1


def test_who_gives_way_is_never_failed_and_all_end_in_the_order_of_their_arrival() -> None:
    scheduler = make_scheduler(kv_units=6)
    for name in "abc":
        scheduler.enqueue(request(name, 3, max_tokens=8))
    last_step = {name: nth for nth, step in enumerate(run_steps(scheduler)) for name, _, _ in step}
    assert scheduler.counters.preemptions > 1
    assert sorted("abc", key=lambda name: last_step[name]) == ["a", "b", "c"]


def test_who_gave_way_waits_before_all_others() -> None:
    scheduler = make_scheduler(kv_units=6, max_running=3)
    for name in "abcd":
        scheduler.enqueue(request(name, 3, max_tokens=4))
    for _ in range(3):
        run_step(scheduler)
    assert scheduler.num_running == 2
    assert scheduler.request_ids == ["a", "b", "c", "d"]


def test_two_that_gave_way_in_one_step_wait_in_the_order_of_their_arrival() -> None:
    scheduler = make_scheduler(kv_units=6)
    for name, prompt_tokens in {"a": 4, "b": 4, "c": 1, "d": 1}.items():
        scheduler.enqueue(request(name, prompt_tokens, max_tokens=2))
    run_step(scheduler)
    run_step(scheduler)  # `a` and `b` need a third block each
    assert scheduler.counters.preemptions == 2
    assert scheduler.request_ids == ["c", "d"]


def test_who_gave_way_is_computed_again_with_the_tokens_it_had() -> None:
    scheduler = make_scheduler(kv_units=6, prefix_cache=False)
    for name in "ab":
        scheduler.enqueue(request(name, 3, max_tokens=6))
    assert pieces_of("b", run_steps(scheduler)) == [(0, 3), (3, 1), (4, 1), (5, 1), (0, 7), (7, 1)]


def test_who_gave_way_starts_again_as_soon_as_there_is_room() -> None:
    scheduler = make_scheduler(kv_units=6, prefix_cache=False)
    for name in "ab":
        scheduler.enqueue(request(name, 3, max_tokens=6))
    while scheduler.counters.preemptions == 0:
        run_step(scheduler)
    scheduler.remove("a")
    assert run_step(scheduler) == [("b", 0, 7)]


def test_who_gave_way_finds_those_of_its_blocks_again_that_nobody_needed() -> None:
    scheduler = make_scheduler(kv_units=6)
    for name in "ab":
        scheduler.enqueue(request(name, 3, max_tokens=6))
    assert pieces_of("b", run_steps(scheduler)) == [(0, 3), (3, 1), (4, 1), (5, 1), (4, 3), (7, 1)]


def test_a_prompt_that_is_being_computed_gives_way_to_an_older_stream() -> None:
    scheduler = make_scheduler(kv_units=8, max_step_tokens=4, prefix_cache=False)
    scheduler.enqueue(request("stream", 2, max_tokens=12))
    run_step(scheduler)
    scheduler.enqueue(request("prompt", 11, max_tokens=1))
    steps = run_steps(scheduler)
    assert pieces_of("stream", steps[:11]) == [(position, 1) for position in range(2, 13)]
    assert pieces_of("prompt", steps) == [(0, 3), (3, 3), (6, 3), (9, 1), (0, 4), (4, 4), (8, 3)]


def test_the_youngest_keeps_what_it_has_while_only_itself_needs_more() -> None:
    scheduler = make_scheduler(kv_units=4)
    scheduler.enqueue(request("older", 2, max_tokens=3))
    scheduler.enqueue(request("younger", 3, max_tokens=4))
    steps = run_steps(scheduler)
    assert [[name for name, _, _ in step] for step in steps[1:4]] == [["older", "younger"], ["older"], ["younger"]]
    assert scheduler.counters.preemptions == 0


# Random traffic.


CONVERSATION = grown([2], 20)
prompts = st.builds(
    lambda shared, own: CONVERSATION[:shared] + tuple(own),
    shared=st.integers(1, len(CONVERSATION)),
    own=st.lists(st.integers(2, 3), max_size=4),
)
steps, cancellations = st.none(), st.builds(Cancellation, st.integers(0, 50))
arrivals = st.builds(
    Arrival,
    prompt=prompts,
    max_tokens=st.integers(1, 16),
    ends_after=st.integers(8, 20),
    timeout_s=st.sampled_from([None] * 12 + [5.0, 20.0, 60.0]),
)
events = st.sampled_from([arrivals] * 10 + [steps] * 20 + [cancellations]).flatmap(lambda kind: kind)
layouts = st.sampled_from(
    [layout_of(1, 3), layout_of(1, 3, 4, 4), layout_of(2, 1, 1, 4), layout_of(1, 0), layout_of(0, 1)]
)


def make_traffic(layout: KvLayout, kv_positions: int, events: Sequence[Event] = (), **limits: Any) -> Traffic:
    """Traffic in which all events have been played; kv_positions: memory for one sequence of so many tokens."""
    clock = FakeClock()
    traffic = Traffic(make_scheduler(layout=layout, kv_units=layout.units(kv_positions), clock=clock, **limits), clock)
    for event in events:
        traffic.play(event)
    return traffic


def traffics(events: st.SearchStrategy[list[Event]]) -> st.SearchStrategy[Traffic]:
    return st.builds(
        make_traffic,
        layout=layouts,
        kv_positions=st.integers(12, 30),
        events=events,
        max_running=st.integers(1, 8),
        max_waiting=st.integers(2, 12),
        max_step_tokens=st.integers(1, 24),
        prefix_cache=st.sampled_from([True, True, True, False]),
        prefill_slowdown=st.sampled_from([None, 3.0]),
    )


busy = traffics(st.lists(events, min_size=30, max_size=90))
random_traffic = settings(max_examples=100, deadline=None)


@dataclass
class Shadow:
    """A KV cache that tells for every place of every unit from which tokens its content was computed."""

    layout: KvLayout
    tables: dict[tuple[int, int], dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    origins: dict[tuple[int, int], int] = field(default_factory=dict)

    def compute(self, pieces: Sequence[Piece]) -> None:
        """Store all new tokens, then look at what each sees, as the layers of the model do."""
        for piece in pieces:
            for entry in piece.new_entries:
                for nth, unit in enumerate(entry.units):
                    self.tables[piece.table_row, entry.first_table + nth][entry.index] = unit
        for piece in pieces:
            for places, origins in self._seen(piece):
                self.origins.update(list(zip(places, origins, strict=True))[-piece.length :])
        for piece in pieces:
            for places, origins in self._seen(piece):
                assert [self.origins.get(place) for place in places] == origins, f"{piece} sees something else"

    def _seen(self, piece: Piece) -> Iterator[tuple[list[tuple[int, int]], list[int]]]:
        """For each table: the places that the piece's last token sees, and what must have been stored there."""
        layout, end = self.layout, len(piece.token_ids)
        chunk_start = piece.first - piece.first % layout.chunk_tokens
        for table in range(layout.num_tables):
            start = 0 if table < layout.global_units else chunk_start
            units = self.tables[piece.table_row, table]
            places = [(units[i // layout.block_tokens], i % layout.block_tokens) for i in range(end - start)]
            yield places, prefix_hashes(piece.token_ids, table)[start:]


def prefix_hashes(token_ids: Iterable[int], table: int) -> list[int]:
    """For each token, what tells it and all before it apart from any other ones in any other layers."""
    return list(accumulate(token_ids, lambda before, token_id: hash((before, token_id)), initial=table))[1:]


@random_traffic
@given(busy)
def test_every_token_sees_what_was_computed_from_its_own_prefix(traffic: Traffic) -> None:
    shadow = Shadow(traffic.scheduler.layout)
    for step in traffic.drain().steps:
        shadow.compute(step.pieces)


@random_traffic
@given(busy)
def test_no_step_exceeds_its_limits(traffic: Traffic) -> None:
    limits = traffic.scheduler.limits
    for step in traffic.drain().steps:
        assert sum(piece.length for piece in step.pieces) <= limits.max_step_tokens
        assert len(step.running) <= limits.max_running
        assert len(step.waiting) <= limits.max_waiting + limits.max_running  # those that gave way wait again


@random_traffic
@given(busy)
def test_no_two_running_requests_share_a_row(traffic: Traffic) -> None:
    row_of: dict[str, int] = {}
    for step in traffic.drain().steps:
        row_of |= {piece.name: piece.table_row for piece in step.pieces}
        row_of = {name: row for name, row in row_of.items() if name in step.running}
        assert len(set(row_of.values())) == len(row_of)


@random_traffic
@given(busy)
def test_every_accepted_request_ends_exactly_once(traffic: Traffic) -> None:
    traffic.drain()
    assert sorted(traffic.ends) == sorted(traffic.accepted)


@random_traffic
@given(busy)
def test_every_request_gets_its_own_answer_whoever_gave_way(traffic: Traffic) -> None:
    traffic.drain()
    for name, arrival in traffic.accepted.items():
        answer = arrival.answer()
        assert traffic.sampled[name] == (answer[: len(traffic.sampled[name])] if name in traffic.stopped else answer)


@random_traffic
@given(busy)
def test_tokens_are_computed_in_order_and_again_only_after_giving_way(traffic: Traffic) -> None:
    block_tokens = traffic.scheduler.layout.block_tokens if traffic.scheduler.limits.prefix_cache else 10**9
    computed: dict[str, int] = {}
    for step in traffic.drain().steps:
        computed = {name: count for name, count in computed.items() if name in step.running}
        for piece in step.pieces:
            if piece.name in computed:
                assert piece.first == computed[piece.name]
            else:
                assert piece.first % block_tokens == 0
            computed[piece.name] = len(piece.token_ids)


def is_being_computed(arrival: Arrival, others: Iterable[tuple[Arrival, int]], block_tokens: int) -> bool:
    """Whether one of the others, so many of whose tokens are computed, is to compute a block that the arrival needs."""
    for other, computed in others:
        # Its answer, too: after giving way it is computed like the prompt.
        pairs = zip(arrival.prompt[:-1], [*other.prompt, *other.answer()], strict=False)
        in_common = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        if in_common // block_tokens > computed // block_tokens:
            return True
    return False


@random_traffic
@given(busy)
def test_no_request_starts_before_an_older_one_that_does_not_wait_for_its_prefix(traffic: Traffic) -> None:
    block_tokens, shares = traffic.scheduler.layout.block_tokens, traffic.scheduler.limits.prefix_cache
    started: set[str] = set()
    computed: dict[str, int] = {}
    before: list[str] = []
    for step in traffic.drain().steps:
        new = [int(name) for name in step.running if name not in started]
        started |= set(step.running)
        running = [(traffic.accepted[name], computed.get(name, 0)) for name in {*before, *step.running}]
        for name in step.waiting:
            if name not in started and int(name) < max(new, default=0):
                assert shares
                assert is_being_computed(traffic.accepted[name], running, block_tokens)
        computed = {name: count for name, count in computed.items() if name in step.running}
        computed |= {piece.name: len(piece.token_ids) for piece in step.pieces}
        before = step.running


@random_traffic
@given(busy)
def test_something_is_computed_in_every_step_in_which_anybody_is_there(traffic: Traffic) -> None:
    assert all(step.pieces for step in traffic.drain().steps if step.running or step.waiting)


@random_traffic
@given(busy)
def test_nobody_is_computed_when_its_client_has_stopped_waiting(traffic: Traffic) -> None:
    for step in traffic.drain().steps:
        assert all(traffic.deadline_s.get(name, step.now_s + 1) > step.now_s for name in step.running + step.waiting)


@random_traffic
@given(busy)
def test_all_memory_comes_back(traffic: Traffic) -> None:
    pool = traffic.drain().scheduler.pool
    assert pool.used_units == 0
    everything = pool.allocate(pool.num_units)
    assert everything is not None
    assert sorted(everything.units) == list(range(pool.num_units))


@random_traffic
@given(busy)
def test_nothing_counts_as_being_computed_when_nobody_runs(traffic: Traffic) -> None:
    assert not traffic.drain().scheduler._being_computed


@random_traffic
@given(busy, arrivals)
def test_nobody_starves_however_many_come_later(traffic: Traffic, newcomer: Arrival) -> None:
    """Whoever is there ends within as many steps as there are tokens to compute for those and a full house."""
    old = traffic.scheduler.request_ids
    house = traffic.scheduler.limits.max_running * newcomer.positions
    patience = sum(traffic.accepted[name].positions for name in old) + house
    for _ in range(patience):
        traffic.arrive(newcomer)
        traffic.step()
    assert not set(old) & set(traffic.scheduler.request_ids)

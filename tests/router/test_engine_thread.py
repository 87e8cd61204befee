"""The engine in its thread: mail from any thread, cancellation within one step, and an end for everybody."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.counts.requests import CANCELLED
from router.engine import Engine
from router.engine_thread import EngineThread
from router.errors import Internal, ResourceExhausted, Unavailable
from router.model.llama4 import Model
from router.request import GenerationRequest, TokenDelta
from router.runner import LocalRunner
from router.schedule.limits import SchedulerLimits
from router.step import StepOutput
from tests.local_model import load_model
from tests.processes import PATIENCE_S
from tests.reference import make_reference, prompt
from tests.router.engines import alone, drawn, greedy, make_engine, tokens_of

ENDLESS = 400  # tokens, which take far longer than any test


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(make_reference(tmp_path_factory.mktemp("scout"), "scout").directory)


class Outbox:
    """Takes what the engine's thread delivers. While `gate` is closed the thread waits with its delivery."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.waiting_at_gate = threading.Event()
        self._batches: queue.SimpleQueue[Sequence[TokenDelta]] = queue.SimpleQueue()
        self.seen: list[TokenDelta] = []

    def deliver(self, deltas: Sequence[TokenDelta]) -> None:
        self._batches.put(deltas)
        if not self.gate.is_set():
            self.waiting_at_gate.set()
            assert self.gate.wait(PATIENCE_S)

    def read_until(self, is_enough: Callable[[list[TokenDelta]], bool]) -> list[TokenDelta]:
        """All deltas so far, once they are enough. Raises queue.Empty if they never are."""
        while not is_enough(self.seen):
            self.seen += self._batches.get(timeout=PATIENCE_S)
        return self.seen

    def read_end_of(self, *names: str) -> list[TokenDelta]:
        return self.read_until(lambda seen: set(names) <= {delta.request_id for delta in seen if delta.is_last})

    def read_all(self) -> list[TokenDelta]:
        """Everything that was delivered; for when the thread has ended."""
        while not self._batches.empty():
            self.seen += self._batches.get_nowait()
        return self.seen


@pytest.fixture
def outbox() -> Outbox:
    return Outbox()


@pytest.fixture
def start(model: Model, outbox: Outbox) -> Iterator[Callable[..., EngineThread]]:
    """Starts an engine in its thread, with given limits."""
    started: list[EngineThread] = []

    def start(**limits: int) -> EngineThread:
        started.append(EngineThread(make_engine(model, **limits), outbox.deliver))
        return started[-1]

    yield start
    outbox.gate.set()
    assert all(thread.stop(PATIENCE_S) for thread in started)


Start = Callable[..., EngineThread]


def close_gate_during(outbox: Outbox, thread: EngineThread, request: GenerationRequest) -> None:
    """Submit a request and return while the thread stands at the gate with its first token."""
    outbox.gate.clear()
    thread.submit(request)
    assert outbox.waiting_at_gate.wait(PATIENCE_S)


def test_a_request_is_answered(start: Start, outbox: Outbox, model: Model) -> None:
    start().submit(greedy("a", prompt(9)))
    assert tokens_of(outbox.read_end_of("a"), "a") == alone(model, greedy("a", prompt(9)))


def test_many_threads_may_submit_at_once(start: Start, outbox: Outbox, model: Model) -> None:
    thread = start()
    requests = [drawn(f"{n}", prompt(3 + n, seed=n), 5, seed=n) for n in range(16)]
    everybody_is_here = threading.Barrier(len(requests))

    def submit(request: GenerationRequest) -> None:
        everybody_is_here.wait(PATIENCE_S)
        thread.submit(request)

    submitters = [threading.Thread(target=submit, args=(request,)) for request in requests]
    for submitter in submitters:
        submitter.start()
    deltas = outbox.read_end_of(*(request.request_id for request in requests))
    for submitter in submitters:
        submitter.join(PATIENCE_S)
    assert all(tokens_of(deltas, request.request_id) == alone(model, request) for request in requests)


def test_a_cancelled_request_makes_no_further_step(start: Start, outbox: Outbox) -> None:
    thread = start()
    close_gate_during(outbox, thread, greedy("cancelled", prompt(9), ENDLESS))
    thread.cancel("cancelled", CANCELLED)
    thread.submit(greedy("next", prompt(5), 2))
    outbox.gate.set()
    deltas = outbox.read_end_of("next")
    assert len(tokens_of(deltas, "cancelled")) == 1


def test_a_cancelled_request_frees_its_memory(start: Start, outbox: Outbox) -> None:
    thread = start()
    close_gate_during(outbox, thread, greedy("cancelled", prompt(9), ENDLESS))
    held = thread.stats.kv_bytes_used
    thread.cancel("cancelled", CANCELLED)
    thread.submit(greedy("next", prompt(5), 2))
    outbox.gate.set()
    outbox.read_end_of("next")
    assert held > 0
    assert thread.stats.kv_bytes_used == 0


def test_a_request_cancelled_before_it_starts_never_runs(start: Start, outbox: Outbox) -> None:
    thread = start()
    close_gate_during(outbox, thread, greedy("first", prompt(9), 2))
    thread.submit(greedy("cancelled", prompt(5)))
    thread.cancel("cancelled", CANCELLED)
    thread.submit(greedy("next", prompt(5), 2))
    outbox.gate.set()
    deltas = outbox.read_end_of("first", "next")
    assert tokens_of(deltas, "cancelled") == []


def test_a_refusal_is_delivered_as_the_requests_last_delta(start: Start, outbox: Outbox) -> None:
    thread = start(kv_positions=20)
    thread.submit(greedy("too large", prompt(15), 6))
    [delta] = outbox.read_end_of("too large")
    assert isinstance(delta.error, ResourceExhausted)


def test_an_id_that_comes_twice_changes_nothing_for_the_first_request(
    start: Start, outbox: Outbox, model: Model
) -> None:
    thread = start()
    close_gate_during(outbox, thread, greedy("a", prompt(9)))
    thread.submit(greedy("a", prompt(5)))
    outbox.gate.set()
    deltas = outbox.read_end_of("a")
    assert tokens_of(deltas, "a") == alone(model, greedy("a", prompt(9)))
    assert not any(delta.error for delta in deltas)


def test_requests_that_are_refused_do_not_disturb_the_others(start: Start, outbox: Outbox) -> None:
    thread = start(max_running=1, max_waiting=2)
    close_gate_during(outbox, thread, greedy("running", prompt(9), 3))
    for name in "abc":
        thread.submit(greedy(name, prompt(5), 2))
    outbox.gate.set()
    deltas = outbox.read_end_of("running", *"abc")
    refused = [delta.request_id for delta in deltas if isinstance(delta.error, ResourceExhausted)]
    assert refused == ["c"]
    assert [len(tokens_of(deltas, name)) for name in ("running", *"abc")] == [3, 2, 2, 0]


def test_a_request_that_cannot_be_queued_is_told_so_and_the_engine_goes_on(
    start: Start, outbox: Outbox, model: Model
) -> None:
    thread = start()
    thread.submit(greedy("bad", prompt(5), logit_bias=((2**63, 1.0),)))
    thread.submit(greedy("good", prompt(9)))
    deltas = outbox.read_end_of("bad", "good")
    [end] = [delta for delta in deltas if delta.request_id == "bad"]
    assert isinstance(end.error, Internal)
    assert tokens_of(deltas, "good") == alone(model, greedy("good", prompt(9)))


NAMES = "abc"
MAILED = {name: greedy(name, prompt(5 + nth, seed=nth), 3) for nth, name in enumerate(NAMES)}
BYSTANDER = greedy("bystander", prompt(9), 12)
_mails = st.lists(st.tuples(st.sampled_from(["submit", "cancel"]), st.sampled_from(NAMES)), min_size=2, max_size=12)


@pytest.fixture(scope="module")
def right(model: Model) -> dict[str, list[int]]:
    return {request.request_id: alone(model, request) for request in (BYSTANDER, *MAILED.values())}


@settings(max_examples=25, deadline=None)
@given(before=_mails, during=_mails, after=_mails)
def test_mail_that_comes_twice_or_out_of_order_hurts_nobody(
    model: Model,
    right: dict[str, list[int]],
    before: list[tuple[str, str]],
    during: list[tuple[str, str]],
    after: list[tuple[str, str]],
) -> None:
    """before: the first step; during: one, so that it is all read at once; after: while steps go on."""
    outbox = Outbox()
    thread = EngineThread(make_engine(model), outbox.deliver)
    forgotten: queue.SimpleQueue[str] = queue.SimpleQueue()

    def post(mails: list[tuple[str, str]]) -> None:
        for what, name in mails:
            if what == "submit":
                thread.submit(MAILED[name])
            else:
                thread.cancel(name, CANCELLED, forgotten.put)

    try:
        post(before)
        close_gate_during(outbox, thread, BYSTANDER)
        post(during)
        outbox.gate.set()
        post(after)
        thread.submit(greedy("probe", prompt(9), 8))
        deltas = outbox.read_end_of("probe", "bystander")
        stats = thread.snapshot
    finally:
        outbox.gate.set()
        assert thread.stop(PATIENCE_S)
    assert tokens_of(deltas, "bystander") == right["bystander"]
    told = [forgotten.get(timeout=PATIENCE_S) for what, _ in before + during + after if what == "cancel"]
    assert told == [name for what, name in before + during + after if what == "cancel"]
    assert (stats.stats.running, stats.stats.waiting, stats.stats.kv_bytes_used) == (0, 0, 0)
    for name in NAMES:
        runs: list[list[int]] = []
        for delta in (delta for delta in deltas if delta.request_id == name):
            assert delta.error is None
            if delta.first == 0:
                runs.append([])
            runs[-1] += delta.token_ids
        was_cancelled = ("cancel", name) in before + during + after
        assert all(made == right[name][: len(made)] if was_cancelled else made == right[name] for made in runs)


def unavailable_in(deltas: Sequence[TokenDelta]) -> list[str]:
    return sorted(delta.request_id for delta in deltas if isinstance(delta.error, Unavailable))


def test_stopping_ends_running_and_waiting_requests_as_unavailable(start: Start, outbox: Outbox) -> None:
    thread = start(max_running=1)
    close_gate_during(outbox, thread, greedy("running", prompt(9), ENDLESS))
    thread.submit(greedy("waiting", prompt(9)))
    outbox.gate.set()
    assert thread.stop(PATIENCE_S)
    assert unavailable_in(outbox.read_all()) == ["running", "waiting"]


def test_stopping_ends_requests_that_the_engine_has_not_seen_yet(start: Start, outbox: Outbox) -> None:
    thread = start()
    close_gate_during(outbox, thread, greedy("seen", prompt(9), ENDLESS))
    thread.submit(greedy("unseen", prompt(9)))
    assert not thread.stop(timeout_s=0)  # the thread stands at the gate, and will not read its mail any more
    outbox.gate.set()
    assert thread.stop(PATIENCE_S)
    assert unavailable_in(outbox.read_all()) == ["seen", "unseen"]


def test_a_stopped_engine_refuses_as_unavailable(start: Start, outbox: Outbox) -> None:
    thread = start()
    assert thread.stop(PATIENCE_S)
    thread.submit(greedy("late", prompt(9)))
    thread.cancel("late", CANCELLED)
    [delta] = outbox.read_all()
    assert str(delta.error) == "the router is stopping"


def test_stopping_twice_is_harmless(start: Start) -> None:
    thread = start()
    assert thread.stop(PATIENCE_S)
    assert thread.stop(PATIENCE_S)


def test_stopping_leaves_no_thread(start: Start) -> None:
    before = engine_threads()
    thread = start()
    assert len(engine_threads()) == len(before) + 1
    assert thread.stop(PATIENCE_S)
    assert engine_threads() == before


def engine_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "engine"}


class DefectiveEngine(Engine):
    """Breaks an invariant in its second step."""

    def step(self) -> list[TokenDelta]:
        assert self.stats.steps < 1, "a defect"
        return super().step()


def test_a_defect_that_ends_the_thread_leaves_nobody_waiting(model: Model, outbox: Outbox) -> None:
    thread = EngineThread(DefectiveEngine(model, SchedulerLimits(8, 8, 64, 2**30)), outbox.deliver)
    thread.submit(greedy("a", prompt(9), ENDLESS))
    deltas = outbox.read_end_of("a")
    assert isinstance(deltas[-1].error, Unavailable)
    thread.submit(greedy("late", prompt(9)))
    assert isinstance(outbox.read_end_of("late")[-1].error, Unavailable)
    assert thread.stop(PATIENCE_S)


class HeldRunner(LocalRunner):
    """Each step waits until it is let go. Meanwhile it may begin new layers."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.let_go = threading.Event()
        self.begins_layers = threading.Event()

    def run(self, *args: Any) -> StepOutput:
        while not self.let_go.wait(0.01):
            if self.begins_layers.is_set():
                self._model.clock.mark(("attention", time.perf_counter()))
        return super().run(*args)


def test_an_engine_that_is_stuck_is_told_of_and_one_that_is_slow_is_not(model: Model) -> None:
    runners: list[HeldRunner] = []

    def make_runner(*args: Any) -> HeldRunner:
        runners.append(HeldRunner(*args))
        return runners[-1]

    stuck = threading.Event()
    thread = EngineThread(make_engine(model, make_runner=make_runner), Outbox().deliver, stuck.set, stuck_after_s=0.2)
    [runner] = runners
    runner.begins_layers.set()
    assert not stuck.wait(0.4)  # there is nothing to do
    thread.submit(greedy("a", prompt(9), 2))
    assert not stuck.wait(0.6)
    runner.begins_layers.clear()
    assert stuck.wait(PATIENCE_S)
    runner.let_go.set()
    assert thread.stop(PATIENCE_S)

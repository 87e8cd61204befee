"""Steps that break and clients that stop waiting: who is told, and that everybody else is served."""

import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoint.tensors import Checkpoint
from checkpoint.weights import WeightReader
from experts.errors import LinkDown
from experts.link import ExpertRows, Link, LocalLink, Reply
from experts.link_table import LinkTable
from experts.placement import even_placement
from experts.shard import load_shard
from kernels.choose import choose_kernels
from router.engine import Engine
from router.errors import (
    AlreadyExists,
    DeadlineExceeded,
    ExpertsAway,
    Internal,
    RequestError,
    ResourceExhausted,
    Unavailable,
)
from router.local import CPU
from router.model.dispatch import Dispatcher
from router.model.llama4 import Model
from tests.reference import Reference, prompt
from tests.router.engines import COMPANY, NUM_SHARDS, FakeClock, alone, greedy, make_engine, run_to_end, tokens_of

KERNELS = choose_kernels(CPU, torch.float32, 1)


class BrokenLink:
    """A link on which every request raises `error`. told, message: what a user is then told."""

    down_reason = "lost: the peer is gone"
    is_loaded = True

    def __init__(self, error: Exception, told: type[RequestError], message: str) -> None:
        self.told, self.message = told, message
        self._error = error

    def request(self, rows: ExpertRows) -> Reply:
        raise self._error

    def close(self) -> None:
        pass


BROKEN_LINKS = {
    "a dead shard": BrokenLink(LinkDown(BrokenLink.down_reason), ExpertsAway, "expert shard 1: lost: the peer is gone"),
    "a defect": BrokenLink(ZeroDivisionError("oh"), Internal, "the router failed in a step; its log says why"),
}


@pytest.fixture(params=BROKEN_LINKS)
def broken(request: pytest.FixtureRequest) -> BrokenLink:
    """What becomes of the link to shard 1."""
    return BROKEN_LINKS[request.param]


@pytest.fixture(scope="module")
def links(reference: Reference) -> list[Link]:
    """A link to each shard, all well."""
    checkpoint = Checkpoint.open(reference.directory)
    placement = even_placement(checkpoint.config.moe_layers, checkpoint.config.num_experts, NUM_SHARDS)
    return [LocalLink(load_shard(checkpoint, placement.slots_of(shard), KERNELS)) for shard in range(NUM_SHARDS)]


def make_fragile(directory: Path, links: Sequence[Link], **limits: int) -> tuple[Engine, LinkTable]:
    """An engine, and the table in which its links can be broken."""
    checkpoint = Checkpoint.open(directory)
    placement = even_placement(checkpoint.config.moe_layers, checkpoint.config.num_experts, NUM_SHARDS)
    table = LinkTable(dict(enumerate(links)))
    weights = WeightReader(checkpoint, torch.float32, CPU)
    fragile = Model(checkpoint.config, weights, Dispatcher(placement, table), KERNELS)
    return make_engine(fragile, **limits), table


def test_a_broken_step_ends_its_requests_and_says_why_and_whether_to_try_again(
    reference: Reference, links: list[Link], broken: BrokenLink
) -> None:
    engine, table = make_fragile(reference.directory, links)
    table.replace(1, broken)
    for seed, name in enumerate("ab"):
        engine.submit(greedy(name, prompt(20, seed=seed)))
    deltas = sorted(engine.step(), key=lambda delta: delta.request_id)
    assert [(delta.request_id, type(delta.error), str(delta.error)) for delta in deltas] == [
        (name, broken.told, broken.message) for name in "ab"
    ]


def test_a_broken_step_frees_its_requests_memory(reference: Reference, links: list[Link], broken: BrokenLink) -> None:
    engine, table = make_fragile(reference.directory, links)
    engine.submit(greedy("a", prompt(20)))
    engine.step()
    table.replace(1, broken)
    assert run_to_end(engine)[-1].error is not None
    assert engine.stats.kv_bytes_used == 0


def test_a_broken_step_leaves_waiting_requests_their_turn(
    reference: Reference, links: list[Link], greedy_tokens: dict[str, list[int]], broken: BrokenLink
) -> None:
    engine, table = make_fragile(reference.directory, links, max_running=1)
    first, second = COMPANY[-2:]
    engine.submit(first)
    engine.submit(second)
    table.replace(1, broken)
    assert [delta.request_id for delta in engine.step()] == [first.request_id]
    table.replace(1, links[1])
    assert tokens_of(run_to_end(engine), second.request_id) == greedy_tokens[second.request_id]


def test_once_the_link_is_replaced_the_engine_goes_on(
    reference: Reference, links: list[Link], greedy_tokens: dict[str, list[int]], broken: BrokenLink
) -> None:
    engine, table = make_fragile(reference.directory, links)
    table.replace(1, broken)
    engine.submit(greedy("lost", prompt(20)))
    run_to_end(engine)
    table.replace(1, links[1])
    for request in COMPANY:
        engine.submit(request)
    deltas = run_to_end(engine)
    assert {request.request_id: tokens_of(deltas, request.request_id) for request in COMPANY} == greedy_tokens


def test_a_broken_steps_tokens_are_no_expert_load(reference: Reference, links: list[Link], broken: BrokenLink) -> None:
    engine, table = make_fragile(reference.directory, links)
    table.replace(1, broken)
    engine.submit(greedy("lost", prompt(20)))
    run_to_end(engine)
    table.replace(1, links[1])
    engine.submit(greedy("served", prompt(5), 1))
    run_to_end(engine)
    experts_per_token = Checkpoint.open(reference.directory).config.experts_per_token
    assert set(engine._counts.expert_load.tokens_LE.sum(axis=1).tolist()) == {5 * experts_per_token}


def test_whoever_waits_for_a_prefix_that_is_never_computed_computes_it(
    reference: Reference, links: list[Link], broken: BrokenLink
) -> None:
    engine, table = make_fragile(reference.directory, links)
    table.replace(1, broken)
    for name in ("lost", "waits"):
        engine.submit(greedy(name, prompt(20)))
    assert [delta.request_id for delta in engine.step()] == ["lost"]
    table.replace(1, links[1])
    assert len(tokens_of(run_to_end(engine), "waits")) == 12


@pytest.mark.parametrize("running", [True, False])
def test_an_id_that_comes_twice_is_refused_and_the_first_request_goes_on(model: Model, running: bool) -> None:
    engine = make_engine(model)
    engine.submit(greedy("a", prompt(5)))
    deltas = engine.step() if running else []
    with pytest.raises(AlreadyExists, match="request a is under way already"):
        engine.submit(greedy("a", prompt(9, seed=1)))
    deltas += run_to_end(engine)
    assert tokens_of(deltas, "a") == alone(model, greedy("a", prompt(5)))
    engine.submit(greedy("a", prompt(5)))  # an id that is free again may be used again


def test_failing_everything_ends_running_and_waiting_requests(model: Model) -> None:
    engine = make_engine(model, max_running=1)
    for name in "abc":
        engine.submit(greedy(name, prompt(5)))
    engine.step()
    deltas = engine.fail_all(Unavailable("the router is stopping"))
    assert [(delta.request_id, str(delta.error)) for delta in deltas] == [
        (name, "the router is stopping") for name in "abc"
    ]
    assert (engine.has_work, engine.stats.kv_bytes_used) == (False, 0)


# Clients that stop waiting.


def test_a_request_whose_deadline_passes_ends_with_deadline_exceeded_running_or_waiting(model: Model) -> None:
    clock = FakeClock()
    engine = make_engine(model, max_running=1, clock=clock)
    for name in ("runs", "waits"):
        engine.submit(replace(greedy(name, prompt(5)), timeout_s=3.0))
    engine.step()
    clock.now_s += 3.0
    deltas = engine.step()
    assert [(delta.request_id, type(delta.error)) for delta in deltas] == [
        ("runs", DeadlineExceeded),
        ("waits", DeadlineExceeded),
    ]
    assert (engine.has_work, engine.stats.kv_bytes_used) == (False, 0)


def test_a_deadline_that_passes_leaves_the_others_tokens_alone(
    model: Model, greedy_tokens: dict[str, list[int]]
) -> None:
    clock = FakeClock()
    engine = make_engine(model, clock=clock)
    hasty, *others = COMPANY
    engine.submit(replace(hasty, timeout_s=1.0))
    for other in others:
        engine.submit(replace(other, timeout_s=60.0))
    deltas = engine.step()
    clock.now_s += 1.0
    deltas += run_to_end(engine)
    assert all(tokens_of(deltas, other.request_id) == greedy_tokens[other.request_id] for other in others)


@pytest.mark.parametrize("retry_after_s", [None, 0.25])
def test_why_a_request_was_refused_can_travel(retry_after_s: float | None) -> None:
    error = ResourceExhausted("5 requests are waiting already", retry_after_s)
    received = pickle.loads(pickle.dumps(error))
    assert (type(received), str(received), received.retry_after_s) == (type(error), str(error), retry_after_s)


@pytest.mark.parametrize(
    "error", [DeadlineExceeded("too late"), Unavailable("down"), Internal("not finite")], ids=lambda e: type(e).__name__
)
def test_why_a_request_ended_can_travel(error: RequestError) -> None:
    received = pickle.loads(pickle.dumps(error))
    assert (type(received), str(received)) == (type(error), str(error))

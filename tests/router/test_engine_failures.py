"""Steps that break and memory that runs out: who is told, and that everybody else is served."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.tensors import Checkpoint
from experts.errors import LinkDown
from experts.link import ExpertRows, Link, LocalLink, Reply
from experts.placement import even_placement
from experts.shard import load_shard
from frontend.one_process import CPU
from router.dispatch import Dispatcher
from router.engine import Engine
from router.errors import Unavailable
from router.kv_cache import SequenceCache
from router.model import Model
from router.weights import WeightReader
from tests.reference import Reference, prompt
from tests.router.engines import COMPANY, NUM_SHARDS, greedy, make_engine, run_to_end, tokens_of


class ShortOfMemory:
    """A model whose device has less memory than was configured: long caches cannot be made."""

    def __init__(self, model: Model, max_positions: int) -> None:
        self._model, self._max_positions = model, max_positions

    def new_cache(self, max_positions: int) -> SequenceCache:
        if max_positions > self._max_positions:
            raise torch.OutOfMemoryError
        return self._model.new_cache(max_positions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def test_a_request_whose_cache_cannot_be_made_ends_and_the_others_go_on(
    model: Model, greedy_tokens: dict[str, list[int]]
) -> None:
    engine = make_engine(ShortOfMemory(model, max_positions=51))  # type: ignore[arg-type]
    for request in COMPANY:
        engine.submit(request)
    deltas = run_to_end(engine)
    [failed] = [delta for delta in deltas if delta.error is not None]
    assert failed.request_id == "40 tokens"
    assert isinstance(failed.error, Unavailable)
    expected = {**greedy_tokens, "40 tokens": []}
    assert {request.request_id: tokens_of(deltas, request.request_id) for request in COMPANY} == expected


# Shards that fail.


class BrokenLink:
    """A link on which every request raises `error`. message: what a user is then told."""

    down_reason = "lost: the peer is gone"

    def __init__(self, error: Exception, message: str) -> None:
        self.message = message
        self._error = error

    def request(self, rows: ExpertRows) -> Reply:
        raise self._error

    def close(self) -> None:
        pass


BROKEN_LINKS = {
    "a dead shard": BrokenLink(LinkDown(BrokenLink.down_reason), "expert shard 1: lost: the peer is gone"),
    "a defect": BrokenLink(ZeroDivisionError("oh"), "the router failed in a step; its log says why"),
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
    return [
        LocalLink(load_shard(checkpoint, 1, placement.experts_of(shard), torch.float32, CPU))
        for shard in range(NUM_SHARDS)
    ]


def make_fragile(directory: Path, links: Sequence[Link], **limits: int) -> tuple[Engine, Dispatcher]:
    """An engine, and the dispatcher in which its links can be broken."""
    checkpoint = Checkpoint.open(directory)
    placement = even_placement(checkpoint.config.moe_layers, checkpoint.config.num_experts, NUM_SHARDS)
    dispatcher = Dispatcher(placement, links)
    fragile = Model(checkpoint.config, WeightReader(checkpoint, torch.float32, CPU), dispatcher)
    return make_engine(fragile, **limits), dispatcher


def test_a_broken_step_ends_its_requests_as_unavailable_and_says_why(
    reference: Reference, links: list[Link], broken: BrokenLink
) -> None:
    engine, dispatcher = make_fragile(reference.directory, links)
    dispatcher.links[1] = broken
    for name in "ab":
        engine.submit(greedy(name, prompt(20)))
    deltas = engine.step()
    assert [(delta.request_id, type(delta.error), str(delta.error)) for delta in deltas] == [
        (name, Unavailable, broken.message) for name in "ab"
    ]


def test_a_broken_step_frees_its_requests_memory(reference: Reference, links: list[Link], broken: BrokenLink) -> None:
    engine, dispatcher = make_fragile(reference.directory, links)
    engine.submit(greedy("a", prompt(20)))
    engine.step()
    dispatcher.links[1] = broken
    assert run_to_end(engine)[-1].error is not None
    assert engine.stats.kv_bytes_used == 0


def test_a_broken_step_leaves_waiting_requests_their_turn(
    reference: Reference, links: list[Link], greedy_tokens: dict[str, list[int]], broken: BrokenLink
) -> None:
    engine, dispatcher = make_fragile(reference.directory, links, max_running=1)
    first, second = COMPANY[-2:]
    engine.submit(first)
    engine.submit(second)
    dispatcher.links[1] = broken
    assert [delta.request_id for delta in engine.step()] == [first.request_id]
    dispatcher.links[1] = links[1]
    assert tokens_of(run_to_end(engine), second.request_id) == greedy_tokens[second.request_id]


def test_once_the_link_is_replaced_the_engine_goes_on(
    reference: Reference, links: list[Link], greedy_tokens: dict[str, list[int]], broken: BrokenLink
) -> None:
    engine, dispatcher = make_fragile(reference.directory, links)
    dispatcher.links[1] = broken
    engine.submit(greedy("lost", prompt(20)))
    run_to_end(engine)
    dispatcher.links[1] = links[1]
    for request in COMPANY:
        engine.submit(request)
    deltas = run_to_end(engine)
    assert {request.request_id: tokens_of(deltas, request.request_id) for request in COMPANY} == greedy_tokens


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

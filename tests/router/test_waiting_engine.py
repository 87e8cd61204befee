"""A step that waits for a shard: everybody is heard meanwhile, and all go on once the shard is back."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from checkpoint.tensors import Checkpoint
from checkpoint.weights import WeightReader
from experts.link import LocalLink
from experts.link_table import LinkTable
from experts.placement import even_placement
from experts.shard import load_shard
from kernels.choose import choose_kernels
from router.counts.requests import CANCELLED
from router.engine_thread import EngineThread
from router.errors import DeadlineExceeded, Unavailable
from router.local import CPU
from router.model.dispatch import Dispatcher
from router.model.llama4 import Model
from tests.processes import PATIENCE_S, wait_until
from tests.reference import Reference, prompt
from tests.router.engines import alone, greedy, make_engine, tokens_of
from tests.router.test_engine_thread import Outbox

KERNELS = choose_kernels(CPU, torch.float32, 1)


@dataclass
class Waiting:
    """An engine in its thread, amid a step of the request "first", whose shard is away."""

    thread: EngineThread
    outbox: Outbox
    table: LinkTable
    link: LocalLink

    def bring_back(self) -> None:
        self.table.replace(0, self.link)


@pytest.fixture
def waiting(reference: Reference) -> Iterator[Waiting]:
    checkpoint = Checkpoint.open(reference.directory)
    config = checkpoint.config
    placement = even_placement(config.moe_layers, config.num_experts, 1)
    table, outbox = LinkTable(), Outbox()
    link = LocalLink(load_shard(checkpoint, placement.slots_of(0), KERNELS))
    dispatcher = Dispatcher(placement, table, heal_s=2 * PATIENCE_S)
    engine = make_engine(Model(config, WeightReader(checkpoint, torch.float32, CPU), dispatcher, KERNELS))
    thread = EngineThread(engine, outbox.deliver)
    thread.submit(greedy("first", prompt(9)))
    wait_until(lambda: thread.stats.running == 1)
    yield Waiting(thread, outbox, table, link)
    assert thread.stop(PATIENCE_S)


def test_a_request_is_cancelled_at_once(waiting: Waiting) -> None:
    forgotten = threading.Event()
    waiting.thread.cancel("first", CANCELLED, lambda request_id: forgotten.set())
    assert forgotten.wait(PATIENCE_S)
    assert (waiting.thread.stats.running, waiting.thread.stats.kv_bytes_used) == (0, 0)
    waiting.bring_back()
    waiting.thread.submit(greedy("next", prompt(3), 2))
    deltas = waiting.outbox.read_end_of("next")
    assert {delta.request_id for delta in deltas} == {"next"}


def test_deadlines_hold_and_new_requests_are_taken(waiting: Waiting, model: Model) -> None:
    hasty, patient = greedy("hasty", prompt(5)), greedy("patient", prompt(5, seed=1))
    waiting.thread.submit(patient)
    waiting.thread.submit(replace(hasty, timeout_s=0.05))
    [told] = waiting.outbox.read_end_of("hasty")
    assert isinstance(told.error, DeadlineExceeded)
    waiting.bring_back()
    deltas = waiting.outbox.read_end_of("first", "patient")
    assert tokens_of(deltas, "first") == alone(model, greedy("first", prompt(9)))
    assert tokens_of(deltas, "patient") == alone(model, patient)


def test_the_engine_can_be_stopped(waiting: Waiting) -> None:
    assert waiting.thread.stop(PATIENCE_S)
    [told] = waiting.outbox.read_end_of("first")
    assert isinstance(told.error, Unavailable)

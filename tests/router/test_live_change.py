"""Experts that move between shards under running streams, over real links: the text stays the same."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from checkpoint.tensors import Checkpoint
from checkpoint.weights import WeightReader
from cluster.policy.change import Change, Hold, PlacementState, Plan, begin
from cluster.policy.wanted import Found, Held
from experts.bell import ThreadBell
from experts.endpoint import Liveness
from experts.group_link import GroupLink
from experts.link_table import LinkTable
from experts.load_pace import LoadPace
from experts.placement import Placement, even_placement, uniform_placement
from experts.shard import ExpertShard, slot_loader
from experts.shard_server import ShardServer
from experts.slots import Slots
from experts.wire import WireFormat
from kernels.choose import choose_kernels
from router.model.dispatch import Dispatcher
from router.model.llama4 import Model
from tests.experts.ends import join_both
from tests.processes import PATIENCE_S, wait_until
from tests.reference import Reference, prompt
from tests.router.engines import alone, greedy, make_engine, tokens_of

CPU = torch.device("cpu")
SHARDS, SLOTS = 3, 8
NAMES = frozenset(f"shard-{number}" for number in range(SHARDS))
LIVENESS = Liveness(heartbeat_s=0.1, silence_s=20.0)
REQUESTS = [greedy(f"r{length}", prompt(length, seed=length), 40) for length in (1, 6, 21)]


@dataclass
class LiveShard:
    """A real server whose slots may change, and the router's link to it."""

    directory: Path
    placement: Placement
    number: int
    table: LinkTable
    order: int = 0
    slots: Slots = field(default_factory=Slots)

    def __post_init__(self) -> None:
        checkpoint, kernels = Checkpoint.open(self.directory), choose_kernels(CPU, torch.float32, 1)
        held = self.placement.slots_of(self.number)
        self.loader = slot_loader(checkpoint, self.slots, held, kernels, pace=LoadPace(50e6))
        self.loader.load_all()
        self._keeping = threading.Thread(target=self.loader.keep_filled)
        self._keeping.start()
        config = checkpoint.config
        wire = WireFormat(config.num_experts, 64, config.hidden_size, torch.float32)
        router_end, shard_end = join_both()
        self.server = ShardServer(ExpertShard(self.slots, kernels, self.loader), CPU)
        self.server.serve(shard_end, wire, LIVENESS, "link")
        self.link = GroupLink(router_end, wire, LIVENESS, self.table.bell, CPU, "link", on_loaded=self.table.look_again)
        self.table.replace(self.number, self.link)

    def close(self) -> None:
        self.link.close()
        self.server.close()
        self.loader.close()
        self._keeping.join(PATIENCE_S)


@dataclass
class Live:
    """A router's model, its shards, and what a controller does for them, by hand."""

    directory: Path
    placement: Placement
    changes: int = 0

    def __post_init__(self) -> None:
        self.table = LinkTable(bell=ThreadBell())
        self.shards = [LiveShard(self.directory, self.placement, number, self.table) for number in range(SHARDS)]
        checkpoint = Checkpoint.open(self.directory)
        self.dispatcher = Dispatcher(self.placement, self.table, heal_s=PATIENCE_S)
        weights = WeightReader(checkpoint, torch.float32, CPU)
        self.model = Model(checkpoint.config, weights, self.dispatcher, choose_kernels(CPU, torch.float32, 1))
        self.state = PlacementState(1, self.placement)

    def found(self) -> dict[str, Found]:
        shards = {
            f"shard-{shard.number}": Found(
                "node", held=Held(shard.order, shard.loader.missing, frozenset({"router-0"}))
            )
            for shard in self.shards
        }
        return {"router-0": Found("node", epoch=self.dispatcher.epoch), **shards}

    def look(self) -> None:
        found = self.found()
        self.state = Plan(self.state, SLOTS).next_state(found)
        for tell in Plan(self.state, SLOTS).tells(found):
            if isinstance(tell, Hold):
                shard = self.shards[int(tell.shard[-1])]
                shard.loader.hold(tell.slots)
                shard.order = tell.order
            else:
                self.dispatcher.route(tell.placement)

    def change(self, target: Placement) -> None:
        """Go to the target, and return once nobody has anything to do."""
        self.state, refusal = begin(Plan(self.state, SLOTS), Change(f"op-{self.changes}", target, "rebalance"), NAMES)
        assert refusal == ""

        def is_settled() -> bool:
            self.look()
            return self.state.is_settled and all(shard.order == self.state.revision for shard in self.shards)

        wait_until(is_settled)
        self.changes += 1


@pytest.fixture
def live(reference: Reference) -> Iterator[Live]:
    config = Checkpoint.open(reference.directory).config
    live = Live(reference.directory, even_placement(config.moe_layers, config.num_experts, SHARDS))
    yield live
    for shard in live.shards:
        shard.close()


def rotated(placement: Placement, by: int) -> Placement:
    shards_of = {
        layer: tuple(tuple((shard + by) % SHARDS for shard in shards) for shards in by_expert)
        for layer, by_expert in placement.shards_of.items()
    }
    return uniform_placement(SHARDS, shards_of)


def test_streams_tell_the_same_while_every_expert_moves(live: Live, model: Model) -> None:
    expected = {request.request_id: alone(model, request) for request in REQUESTS}
    engine, is_over = make_engine(live.model), threading.Event()

    def change_on_and_on() -> None:
        while not is_over.is_set():
            live.change(rotated(live.placement, live.changes + 1))

    changing = threading.Thread(target=change_on_and_on)
    changing.start()
    try:
        rounds = 0
        while live.changes < 4:
            for request in REQUESTS:
                engine.submit(request)
            deltas = []
            while engine.has_work:
                deltas += engine.step()
            assert {request.request_id: tokens_of(deltas, request.request_id) for request in REQUESTS} == expected
            rounds += 1
    finally:
        is_over.set()
        changing.join(PATIENCE_S)
    assert not changing.is_alive()
    assert rounds
    assert not live.dispatcher.asker.retries, "somebody was asked for what it does not hold"
    target = rotated(live.placement, live.changes)
    assert [{*shard.slots.versions()} for shard in live.shards] == [{*target.slots_of(n)} for n in range(SHARDS)]

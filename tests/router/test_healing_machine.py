"""An engine and its shards through random faults at every point: each stream gets what it gets without any.

Whatever fails comes back within heal_s, so no request may end early, except by a computation that
failed on two shards.
"""

from collections.abc import Callable
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from checkpoint.tensors import Checkpoint
from checkpoint.weights import WeightReader
from experts.errors import ComputeFailed, NotHeld
from experts.link_table import LinkTable
from experts.placement import even_placement
from experts.shard import ExpertShard, load_shard
from kernels.choose import choose_kernels
from router.engine import Engine
from router.errors import Internal
from router.local import CPU
from router.model.dispatch import Dispatcher
from router.model.llama4 import Model
from router.request import GenerationRequest, TokenDelta
from tests.reference import Reference, prompt
from tests.router.engines import alone, drawn, greedy, make_engine
from tests.router.faulty_shards import FakeTime, FaultyShard

KERNELS = choose_kernels(CPU, torch.float32, 1)
NUM_SHARDS, HEAL_S = 3, 30.0
PROMPTS = [prompt(length, seed=length) for length in (1, 6, 21)]
MAX_STEPS = 400


@dataclass
class Served:
    """What the machines share: the weights, and what each request is to be told."""

    directory: Checkpoint
    shards: dict[int, list[ExpertShard]]
    expected: Callable[[GenerationRequest], list[int]]


def request_of(name: str, which: int, max_tokens: int, *, is_drawn: bool) -> GenerationRequest:
    return (drawn if is_drawn else greedy)(name, PROMPTS[which], max_tokens)


class Machine(RuleBasedStateMachine):
    """replicas: set before the first example."""

    served: Served
    replicas: int

    def __init__(self) -> None:
        super().__init__()
        config = self.served.directory.config
        placement = even_placement(config.moe_layers, config.num_experts, NUM_SHARDS, replicas=self.replicas)
        self.time = FakeTime()
        table = LinkTable(bell=self.time, clock=self.time)
        self.shards = [
            FaultyShard(number, shard, table, self.time)
            for number, shard in enumerate(self.served.shards[self.replicas])
        ]
        weights = WeightReader(self.served.directory, torch.float32, CPU)
        dispatcher = Dispatcher(placement, table, CPU, HEAL_S, self.time)
        self.engine: Engine = make_engine(Model(config, weights, dispatcher, KERNELS), clock=self.time)
        self.engine.call_while_waiting(self.read_mail)
        self.requests: dict[str, GenerationRequest] = {}
        self.told: dict[str, list[int]] = {}
        self.running: set[str] = set()
        self.mail: list[Callable[[], None]] = []
        self.compute_faults = 0

    def read_mail(self) -> None:
        mail, self.mail = self.mail, []
        for deed in mail:
            deed()

    def take(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            name = delta.request_id
            assert name in self.running, "told after its end"
            if delta.error is not None:
                assert isinstance(delta.error, Internal), delta.error
                assert self.compute_faults >= 2
            self.told[name] += delta.token_ids
            expected = self.served.expected(self.requests[name])
            assert self.told[name] == expected[: len(self.told[name])]
            if delta.is_last:
                self.running.discard(name)
                assert delta.error is not None or self.told[name] == expected

    @rule(which=st.integers(0, len(PROMPTS) - 1), max_tokens=st.integers(1, 6), is_drawn=st.booleans())
    def submit(self, which: int, max_tokens: int, is_drawn: bool) -> None:
        name = f"r{len(self.requests)}"
        self.requests[name] = request_of(name, which, max_tokens, is_drawn=is_drawn)
        self.told[name] = []
        self.running.add(name)
        self.engine.submit(self.requests[name])

    @precondition(lambda self: self.running)
    @rule(nth=st.integers(0, 5), amid_step=st.booleans())
    def cancel(self, nth: int, amid_step: bool) -> None:
        name = sorted(self.running)[nth % len(self.running)]

        def deed() -> None:
            self.running.discard(name)
            self.engine.cancel(name, "cancelled")

        if amid_step:
            self.mail.append(deed)
        else:
            deed()

    @precondition(lambda self: self.running)
    @rule(steps=st.integers(1, 3))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.take(self.engine.step())
            self.read_mail()

    @rule(
        shard=st.integers(0, NUM_SHARDS - 1),
        requests=st.integers(1, 6),
        fault=st.sampled_from(["kill", "freeze", "refuse", "fail", "slow", "quick"]),
        seconds=st.sampled_from([0.0, 0.0005, 0.2, 3.0, 9.0]),
        loading_s=st.sampled_from([0.0, 2.0]),
    )
    def fault(self, shard: int, requests: int, fault: str, seconds: float, loading_s: float) -> None:
        """At one of the shard's next requests, or some time after it, while its answer is awaited."""
        struck = self.shards[shard]
        strikes: dict[str, Callable[[], None]] = {
            "kill": lambda: struck.kill(seconds, loading_s),
            "freeze": lambda: struck.freeze(seconds),
            "refuse": lambda: struck.refuse(NotHeld),
            "fail": lambda: self.fail(struck),
            "slow": lambda: setattr(struck, "slowness", 300.0),
            "quick": lambda: setattr(struck, "slowness", 1.0),
        }
        strike = strikes[fault]
        struck.arm(requests, strike if seconds else lambda: self.time.after(0.0005, strike))

    def fail(self, struck: FaultyShard) -> None:
        self.compute_faults += 1
        struck.refuse(ComputeFailed)

    @rule(seconds=st.sampled_from([0.3, 5.0]))
    def pass_by(self, seconds: float) -> None:
        self.time.pass_by(seconds)

    def teardown(self) -> None:
        self.read_mail()
        for _ in range(MAX_STEPS):
            if not self.engine.has_work:
                break
            self.take(self.engine.step())
            self.read_mail()
        assert not self.running
        assert self.engine.stats.kv_bytes_used == 0


@pytest.fixture(scope="module")
def served(reference: Reference, model: Model) -> Served:
    checkpoint = Checkpoint.open(reference.directory)
    config = checkpoint.config
    shards = {}
    for replicas in (1, 2):
        placement = even_placement(config.moe_layers, config.num_experts, NUM_SHARDS, replicas=replicas)
        shards[replicas] = [load_shard(checkpoint, placement.slots_of(n), KERNELS) for n in range(NUM_SHARDS)]
    known: dict[tuple[object, ...], list[int]] = {}

    def expected(request: GenerationRequest) -> list[int]:
        key = (request.prompt_token_ids, request.sampling)
        if key not in known:
            known[key] = alone(model, request)
        return known[key]

    return Served(checkpoint, shards, expected)


@pytest.mark.parametrize("replicas", [1, 2])
def test_every_stream_gets_what_it_gets_without_faults(served: Served, replicas: int) -> None:
    machine = type("Machine", (Machine,), {"served": served, "replicas": replicas})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )

"""What an engine over a real model counts, after traffic that is known."""

import time

import pytest

from router.counts.requests import CANCELLED, EngineSnapshot
from router.engine import Engine
from router.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from router.model.llama4 import Model
from router.request import GenerationRequest, SamplingParams
from tests.local_model import load_model
from tests.reference import Reference, prompt
from tests.router.engines import COMPANY, NUM_SHARDS, FakeClock, greedy, make_engine, run_to_end

GENERATED = sum(request.sampling.max_tokens for request in COMPANY)
PROMPTED = sum(len(request.prompt_token_ids) for request in COMPANY)


@pytest.fixture
def own_model(reference: Reference) -> Model:
    """A model counts for its one engine, so these tests share none."""
    return load_model(reference.directory, num_shards=NUM_SHARDS)


def after(engine: Engine, *requests: GenerationRequest) -> EngineSnapshot:
    for request in requests:
        engine.submit(request)
    run_to_end(engine)
    return engine.snapshot


def endings(snapshot: EngineSnapshot) -> dict[str, int]:
    return {ending: count for ending, count in snapshot.requests.ended.items() if count}


def test_every_request_and_token_is_counted_once(own_model: Model) -> None:
    snapshot = after(make_engine(own_model), *COMPANY)
    requests = snapshot.requests
    assert endings(snapshot) == {"length": len(COMPANY)}
    assert (snapshot.stats.prompt_tokens, snapshot.stats.generated_tokens) == (PROMPTED, GENERATED)
    assert requests.first_token_s.count == requests.queue_s.count == requests.request_s.count == len(COMPANY)
    assert requests.inter_token_s.count == GENERATED - len(COMPANY)
    assert (requests.prompt_length.sum, requests.generation_length.sum) == (PROMPTED, GENERATED)
    assert requests.queue_s.sum <= requests.first_token_s.sum <= requests.request_s.sum


def test_phases_make_up_the_steps(own_model: Model) -> None:
    snapshot = after(make_engine(own_model), *COMPANY)
    assert snapshot.step_s.count == snapshot.stats.steps
    assert sum(snapshot.phase_s.values()) == pytest.approx(snapshot.step_s.sum, rel=1e-6)
    assert all(seconds > 0 for seconds in snapshot.phase_s.values())


def test_expert_load_is_what_the_layers_sent(own_model: Model) -> None:
    snapshot = after(make_engine(own_model, prefix_cache=False), *COMPANY)
    config = own_model.config
    # A request's last token is not computed any more.
    rows = (PROMPTED + GENERATED - len(COMPANY)) * config.experts_per_token
    assert own_model.dispatcher.load.tokens_LE.sum(axis=1).tolist() == [rows] * len(config.moe_layers)
    assert sum(snapshot.rows_of_shard.values()) == rows * len(config.moe_layers)
    assert all(snapshot.rows_of_shard.values())


def test_prefixes_found_are_counted_in_tokens(own_model: Model) -> None:
    engine = make_engine(own_model)
    after(engine, greedy("first", prompt(20), 2))
    stats = after(engine, greedy("again", prompt(20), 2)).stats
    assert (stats.prefix_queried_tokens, stats.prefix_hit_tokens) == (40, 16)  # in whole blocks of 4, but the last
    assert stats.prompt_tokens == 20 + 4
    assert stats.kv_bytes_used == 0
    assert 0 < stats.kv_bytes_cached < stats.kv_bytes_total


def test_each_way_to_end_is_told_apart(own_model: Model) -> None:
    clock = FakeClock()
    engine = make_engine(own_model, max_waiting=5, clock=clock)
    eos = greedy("stops", prompt(5), 12, stop_token_ids=frozenset(range(own_model.config.vocab_size)))
    late = GenerationRequest("late", prompt(5), SamplingParams(12), timeout_s=1.0)
    for request in (eos, late, *(greedy(name, prompt(5)) for name in ("leaves", "has its stop string", "fails"))):
        engine.submit(request)
    with pytest.raises(ResourceExhausted):
        engine.submit(greedy("refused", prompt(5)))
    engine.step()
    engine.cancel("leaves", CANCELLED)
    engine.cancel("has its stop string", "stop")
    clock.now_s += 2.0
    assert isinstance(engine.step()[0].error, DeadlineExceeded)
    engine.fail_all(Unavailable("the test is over"))
    expected = {"stop": 2, "deadline": 1, "cancelled": 1, "error": 1, "refused": 1}
    assert endings(engine.snapshot) == expected


def test_waiting_before_the_engine_saw_it_counts(own_model: Model) -> None:
    engine = make_engine(own_model)
    engine.submit(greedy("early", prompt(5), 1), arrived_s=time.perf_counter() - 1000)
    engine.submit(greedy("now", prompt(5), 1))
    run_to_end(engine)
    waits = engine.snapshot.requests.first_token_s
    assert waits.count == 2
    assert waits.counts[-1] == 1
    assert 1000 < waits.sum < 1100

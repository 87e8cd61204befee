"""Through Ray, links, Serve and gRPC, with any number of shards, every token is the one that transformers gives."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from checkpoint.tokenizer import Tokenizer
from client import Client, Delta, Message, Usage
from cluster.launch import Deployment
from tests.cluster.deployment import MAVERICK, SCOUT, SharedRay, router_stats
from tests.reference import Reference, prompt

PROMPT_LENGTHS = (1, 11, 16, 17, 40, 75)


@pytest.fixture(scope="module", params=(MAVERICK, SCOUT), ids=lambda p: f"{p[0]} on {p[1]['shards']['count']} shards")
def served(
    request: pytest.FixtureRequest, shared_ray: SharedRay, reference_of: Callable[[str], Reference]
) -> tuple[Deployment, Reference]:
    model, changes = request.param
    reference = reference_of(model)
    return shared_ray.serve(reference.directory, **changes), reference


@pytest.fixture(scope="module")
def reference(served: tuple[Deployment, Reference]) -> Reference:
    return served[1]


@pytest.fixture(scope="module")
def client(served: tuple[Deployment, Reference]) -> Iterator[Client]:
    with Client(served[0].address) as client:
        yield client


def generated(deltas: Iterator[Delta]) -> tuple[list[int], list[Delta]]:
    received = list(deltas)
    return [token_id for delta in received for token_id in delta.token_ids], received


@pytest.mark.parametrize("length", PROMPT_LENGTHS)
def test_greedy_tokens_and_logprobs_are_the_references(client: Client, reference: Reference, length: int) -> None:
    tokens = list(prompt(length))
    expected, logits = reference.greedy(tokens, 64)
    chosen, deltas = generated(client.generate(tokens, max_tokens=64, temperature=0, logprobs=5))
    assert chosen == expected
    logprobs = torch.log_softmax(logits, dim=-1)
    entries = [entry for delta in deltas for entry in delta.logprobs]
    for place, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(float(logprobs[place, entry.token_id]), abs=1e-4)
        assert [a.token_id for a in entry.top] == logprobs[place].topk(5).indices.tolist()
        assert [a.logprob for a in entry.top] == pytest.approx(logprobs[place].topk(5).values.tolist(), abs=1e-4)
    assert len(entries) == 64


def test_requests_at_once_get_what_each_gets_alone(client: Client, reference: Reference) -> None:
    def ask(length: int) -> list[int]:
        return generated(client.generate(list(prompt(length)), max_tokens=32, temperature=0))[0]

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, PROMPT_LENGTHS * 2))
    assert answers == [reference.greedy(list(prompt(length)), 32)[0] for length in PROMPT_LENGTHS * 2]
    stats = router_stats()
    assert stats.engine is not None
    assert (stats.engine.running, stats.engine.waiting, stats.engine.kv_bytes_used) == (0, 0, 0)


def test_text_is_what_the_same_tokens_decode_to(client: Client, reference: Reference) -> None:
    token_ids, deltas = generated(client.generate("Once upon", max_tokens=40, seed=3))
    tokenizer = Tokenizer.open(reference.directory)
    assert "".join(delta.text for delta in deltas) == tokenizer.decode(token_ids, skip_special=True)
    assert deltas[-1].usage == Usage(len(tokenizer.encode("Once upon", add_bos=True)), 40)


def test_the_same_seed_gives_the_same_answer_and_another_does_not(client: Client) -> None:
    messages = [Message("user", "hello")]
    first, again, other = (generated(client.chat(messages, max_tokens=24, seed=seed))[0] for seed in (1, 1, 2))
    assert first == again != other


def test_the_kv_cache_is_as_large_as_the_deployment_asks(served: tuple[Deployment, Reference]) -> None:
    asked, engine = served[0].config.engine, router_stats().engine
    assert engine is not None
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = asked.kv_bytes if asked.kv_share is None else asked.kv_share * memory
    assert limit is not None
    assert 0 < engine.kv_bytes_total <= limit

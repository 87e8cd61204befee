"""The model that Drover ships, loaded by plain transformers and by a cluster of five shards: the same text."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from client import Client
from cluster.launch import Deployment
from tests.cluster.deployment import SharedRay

EMBEDDED = Path(__file__).parent.parent.parent / "demo" / "drover-demo"
TEXTS = (
    "In the beginning",
    "It is a truth universally acknowledged, that",
    "lighthouse (noun):",
    "The following example shows how to",
    # More than one attention chunk of 256 tokens.
    "And God said, Let there be light: and there was light. " * 30,
)
QUESTIONS = ("What is photosynthesis?", "What is a narwhal?", "Hello!")


@pytest.fixture(scope="module")
def deployment(shared_ray: SharedRay) -> Deployment:
    return shared_ray.serve(EMBEDDED, dtype="float32", shards={"count": 5, "cpus": 0.1})


@pytest.fixture(scope="module")
def client(deployment: Deployment) -> Iterator[Client]:
    with Client(deployment.address) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(EMBEDDED)


@pytest.fixture(scope="module")
def oracle() -> Any:
    """transformers' own Llama 4, with the shipped bf16 weights upcast."""
    return AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()


def greedy(oracle: Any, token_ids: list[int], count: int) -> list[int]:
    """The new tokens; the one that ends the text, as a server does, left out."""
    with torch.no_grad():
        made = oracle.generate(torch.tensor([token_ids]), max_new_tokens=count, do_sample=False)
    ids: list[int] = made[0, len(token_ids) :].tolist()
    return ids[:-1] if ids[-1] in oracle.generation_config.eos_token_id else ids


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:16])
def test_a_text_goes_on_as_in_transformers(client: Client, tokenizer: Any, oracle: Any, text: str) -> None:
    expected = greedy(oracle, tokenizer(text).input_ids, 64)
    continued = "".join(delta.text for delta in client.generate(text, max_tokens=64, temperature=0))
    assert continued == tokenizer.decode(expected)
    assert len(continued) > 20


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_chat_goes_on_as_in_transformers(client: Client, tokenizer: Any, oracle: Any, question: str) -> None:
    chat = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    expected = greedy(oracle, list(chat["input_ids"]), 64)
    answer = "".join(delta.text for delta in client.chat([("user", question)], max_tokens=64, temperature=0))
    assert answer == tokenizer.decode(expected)
    assert answer.endswith(".")


def test_asked_at_once_each_gets_what_it_gets_alone(client: Client, tokenizer: Any, oracle: Any) -> None:
    def continued(text: str) -> str:
        return "".join(delta.text for delta in client.generate(text, max_tokens=32, temperature=0))

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(continued, TEXTS * 2))
    assert answers == [tokenizer.decode(greedy(oracle, tokenizer(text).input_ids, 32)) for text in TEXTS] * 2

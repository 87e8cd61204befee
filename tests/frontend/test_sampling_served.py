"""Every sampling parameter through the whole of a server: gRPC, frontend, engine, a real model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from checkpoint.tokenizer import Tokenizer
from client import Client, Delta
from frontend.in_process.server import serve_checkpoint
from protos.drover.v1 import inference_pb2 as pb
from protos.drover.v1.inference_pb2_grpc import InferenceStub
from tests.processes import PATIENCE_S
from tests.reference import Reference, make_served_reference, prompt

EOS = 300


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_served_reference(tmp_path_factory.mktemp("tiny") / "scout", "scout")


@pytest.fixture(scope="module")
def directory(reference: Reference) -> Path:
    return reference.directory


@pytest.fixture(scope="module")
def client(directory: Path) -> Iterator[Client]:
    with serve_checkpoint(directory, threads=1) as address, Client(address) as client:
        yield client


@pytest.fixture(scope="module")
def readable(directory: Path) -> dict[int, float]:
    """Biases with which the model writes nothing but a few letters, in an order of its own."""
    tokenizer = Tokenizer.open(directory)
    return dict.fromkeys(tokenizer.encode("abcdefghij ", add_bos=False), 60.0)


def answer(client: Client, **sampling: Any) -> list[Delta]:
    return list(client.generate(prompt(12), timeout_s=PATIENCE_S, **{"max_tokens": 40, "seed": 5, **sampling}))


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def tokens_of(deltas: list[Delta]) -> list[int]:
    return [token_id for delta in deltas for token_id in delta.token_ids]


@pytest.mark.parametrize(("start", "length"), [(3, 1), (10, 2), (17, 5), (25, 12), (39, 1)])
def test_a_stop_string_ends_the_text_before_it(
    client: Client, readable: dict[int, float], start: int, length: int
) -> None:
    whole = answer(client, logit_bias=readable)
    text = text_of(whole)
    assert len(text) == 40
    stop = text[start : start + length]
    deltas = answer(client, logit_bias=readable, stop=["nothing", stop])
    *_, last = deltas
    assert text_of(deltas) == text[: text.index(stop)]
    assert (last.finish_reason, last.stop_string) == ("stop", stop)
    made = text.index(stop) + length
    assert tokens_of(deltas) == tokens_of(whole)[:made]
    assert last.usage is not None
    assert last.usage.completion_tokens == made


def test_a_stop_string_counts_after_min_tokens_only(client: Client, readable: dict[int, float]) -> None:
    text = text_of(answer(client, logit_bias=readable))
    stop = text[2]
    late = text.index(stop, 20)
    deltas = answer(client, logit_bias=readable, stop=[stop], min_tokens=late)
    assert text_of(deltas) == text[:late]


def test_bias_min_tokens_and_stop_tokens_go_together(client: Client) -> None:
    deltas = answer(client, logit_bias={7: 100, 9: 90}, stop_token_ids=[7], min_tokens=3, temperature=0)
    assert tokens_of(deltas) == [9, 9, 9, 7]
    assert (deltas[-1].finish_reason, deltas[-1].stop_token_id) == ("stop", 7)


def test_several_answers_are_reproducible_and_differ(client: Client) -> None:
    def answers(n: int) -> list[list[int]]:
        deltas = answer(client, n=n, max_tokens=12)
        return [tokens_of([delta for delta in deltas if delta.index == index]) for index in range(n)]

    first = answers(4)
    assert [len(tokens) for tokens in first] == [12] * 4
    assert len(set(map(tuple, first))) == 4
    assert answers(4) == first
    assert answers(2) == first[:2]
    assert answers(1) == first[:1]


def test_greedy_answers_are_equal(client: Client) -> None:
    deltas = answer(client, n=3, max_tokens=6, temperature=0)
    first, *others = (tokens_of([delta for delta in deltas if delta.index == index]) for index in range(3))
    assert others == [first, first]


def test_the_prompts_logprobs_are_transformers(client: Client, reference: Reference) -> None:
    deltas = answer(client, prompt_logprobs=2, n=2, max_tokens=2)
    assert not [delta for delta in deltas if delta.index and delta.prompt_logprobs]
    entries = [entry for delta in deltas for entry in delta.prompt_logprobs]
    assert [entry.token_id for entry in entries] == [*prompt(12)]
    assert (entries[0].logprob, entries[0].top) == (None, ())
    expected_TV = torch.log_softmax(reference.prefill_logits(list(prompt(12))), dim=-1)
    for place, entry in enumerate(entries[1:]):
        assert entry.logprob == pytest.approx(float(expected_TV[place, entry.token_id]), abs=1e-3)
        assert [top.token_id for top in entry.top] == expected_TV[place].topk(2).indices.tolist()


def test_ignore_eos_goes_on(directory: Path, tmp_path: Path) -> None:
    ending = make_served_reference(tmp_path / "ending", "scout").directory
    config = ending / "config.json"
    config.write_text(config.read_text().replace('"eos_token_id": null', f'"eos_token_id": {EOS}'))
    (ending / "generation_config.json").unlink(missing_ok=True)
    with serve_checkpoint(ending, threads=1) as address, Client(address) as client:
        assert client.model_info(timeout_s=PATIENCE_S).eos_token_ids == (EOS,)
        bias = {EOS: 100}
        ended = answer(client, logit_bias=bias, max_tokens=5)
        assert (tokens_of(ended), ended[-1].finish_reason, ended[-1].stop_token_id) == ([EOS], "stop", EOS)
        ignored = answer(client, logit_bias=bias, max_tokens=5, ignore_eos=True)
        assert (tokens_of(ignored), ignored[-1].finish_reason) == ([EOS] * 5, "length")


def test_a_request_gives_up_when_its_timeout_passes(directory: Path) -> None:
    """For clients that cannot set a call's deadline: here the call itself would have waited far longer."""
    with serve_checkpoint(directory, threads=1) as address, grpc.insecure_channel(address) as channel:
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=prompt(12)),
            sampling=pb.SamplingParams(max_tokens=490, ignore_eos=True),
            timeout_s=0.05,
        )
        stream = InferenceStub(channel).Generate(request, timeout=PATIENCE_S)
        with pytest.raises(grpc.RpcError, match="the request's deadline passed before it was done") as error:
            list(stream)
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED

"""Every bad request is refused with a status and the name of the field, before anything reaches the router."""

import grpc
import pytest

from frontend.grpc_api.server import max_request_bytes
from protos.drover.v1 import inference_pb2 as pb
from protos.drover.v1 import inference_pb2_grpc
from tests.fake_router import VOCAB_SIZE, FakeRouter
from tests.loopback import failure_of, serving
from tests.processes import PATIENCE_S

CONTEXT_TOKENS = 1000
MIB = 2**20


def generate(stub, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    return list(stub.Generate(request, timeout=PATIENCE_S))


def sampled(**sampling) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="Hi", sampling=pb.SamplingParams(**sampling))


BAD_PROMPTS = {
    "unset prompt": (pb.GenerateRequest(), "prompt: is not set; give text or token_ids"),
    "empty text": (pb.GenerateRequest(text=""), "prompt.text: is empty; give at least one character, or token_ids"),
    "empty token ids": (
        pb.GenerateRequest(token_ids=pb.TokenIds()),
        "prompt: is empty; give at least one token of text or token_ids",
    ),
    "token id out of range": (
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, VOCAB_SIZE])),
        "prompt.token_ids: contains 258; token ids go from 0 to 257",
    ),
    "too many token ids": (
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * CONTEXT_TOKENS)),
        "prompt.token_ids: has at least 1000 tokens; the context holds 1000, prompt and completion together",
    ),
    "too many tokens of text": (
        pb.GenerateRequest(text="x" * CONTEXT_TOKENS),
        "prompt: has 1001 tokens; the context holds 1000, prompt and completion together",
    ),
    "3 MiB of text": (
        pb.GenerateRequest(text="x" * 3 * MIB),
        "prompt.text: has at least 349525 tokens; the context holds 1000, prompt and completion together",
    ),
    "3 MiB of long characters": (
        pb.GenerateRequest(text="🦙" * (3 * MIB // 4)),
        "prompt.text: has at least 349525 tokens; the context holds 1000, prompt and completion together",
    ),
}
BAD_SAMPLING = {
    "negative temperature": (
        sampled(temperature=-0.5),
        "sampling.temperature: is -0.5; must be from 0 (greedy) to 100",
    ),
    "NaN temperature": (
        sampled(temperature=float("nan")),
        "sampling.temperature: is nan; must be from 0 (greedy) to 100",
    ),
    "infinite temperature": (
        sampled(temperature=float("inf")),
        "sampling.temperature: is inf; must be from 0 (greedy) to 100",
    ),
    "hot temperature": (sampled(temperature=101), "sampling.temperature: is 101; must be from 0 (greedy) to 100"),
    "zero top_p": (sampled(top_p=0), "sampling.top_p: is 0; must be above 0 and at most 1"),
    "top_p above 1": (sampled(top_p=2), "sampling.top_p: is 2; must be above 0 and at most 1"),
    "NaN top_p": (sampled(top_p=float("nan")), "sampling.top_p: is nan; must be above 0 and at most 1"),
    "zero max_tokens": (sampled(max_tokens=0), "sampling.max_tokens: is 0; must be at least 1"),
    "max_tokens beyond the context": (
        sampled(max_tokens=CONTEXT_TOKENS),
        "sampling.max_tokens: is 1000; with a prompt of 3 tokens at most 997 fit into the context of 1000",
    ),
    "negative top_k": (sampled(top_k=-1), "sampling.top_k: is -1; must be 0 (keep all) or more"),
    "21 logprobs": (sampled(logprobs=21), "sampling.logprobs: is 21; must be from 0 to 20"),
    "negative logprobs": (sampled(logprobs=-1), "sampling.logprobs: is -1; must be from 0 to 20"),
    "min_p above 1": (sampled(min_p=1.5), "sampling.min_p: is 1.5; must be from 0 (keep all) to 1"),
    "presence_penalty out of range": (
        sampled(presence_penalty=3),
        "sampling.presence_penalty: is 3; must be from -2 to 2",
    ),
    "frequency_penalty out of range": (
        sampled(frequency_penalty=-3),
        "sampling.frequency_penalty: is -3; must be from -2 to 2",
    ),
    "zero repetition_penalty": (
        sampled(repetition_penalty=0),
        "sampling.repetition_penalty: is 0; must be above 0 and finite (1 changes nothing)",
    ),
    "bias of an unknown token": (
        sampled(logit_bias={VOCAB_SIZE: 1}),
        "sampling.logit_bias: contains 258; token ids go from 0 to 257",
    ),
    "NaN bias": (
        sampled(logit_bias={5: float("nan")}),
        "sampling.logit_bias: gives token 5 a bias of nan; must be from -100 to 100",
    ),
    "min_tokens above max_tokens": (
        sampled(max_tokens=3, min_tokens=4),
        "sampling.min_tokens: is 4; must be from 0 to max_tokens, 3",
    ),
    "21 prompt_logprobs": (sampled(prompt_logprobs=21), "sampling.prompt_logprobs: is 21; must be from 0 to 20"),
    "no answers": (sampled(n=0), "sampling.n: is 0; must be from 1 to 16"),
    "too many answers": (sampled(n=17), "sampling.n: is 17; must be from 1 to 16"),
    "empty stop string": (sampled(stop=["a", ""]), "sampling.stop[1]: has 0 characters; must have from 1 to 256"),
    "long stop string": (sampled(stop=["ü" * 257]), "sampling.stop[0]: has 257 characters; must have from 1 to 256"),
    "17 stop strings": (sampled(stop=list("abcdefghijklmnopq")), "sampling.stop: has 17 entries; at most 16 are taken"),
    "4097 stop token ids": (
        sampled(stop_token_ids=[5] * 4097),
        "sampling.stop_token_ids: has 4097 entries; at most 4096 are taken",
    ),
    "1025 biases": (
        sampled(logit_bias=dict.fromkeys(range(1025), 1.0)),
        "sampling.logit_bias: has 1025 entries; at most 1024 are taken",
    ),
    "no time at all": (
        pb.GenerateRequest(text="Hi", timeout_s=0),
        "timeout_s: is 0; must be above 0 and finite",
    ),
    "stop token id out of range": (
        sampled(stop_token_ids=[VOCAB_SIZE]),
        "sampling.stop_token_ids: contains 258; token ids go from 0 to 257",
    ),
}


@pytest.mark.parametrize(("request_", "details"), (BAD_PROMPTS | BAD_SAMPLING).values(), ids=BAD_PROMPTS | BAD_SAMPLING)
def test_a_bad_field_is_named_and_nothing_is_queued(router, stub, request_: pb.GenerateRequest, details: str) -> None:
    error = failure_of(lambda: generate(stub, request_))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == details
    assert router.requests == []


BAD_CHATS = {
    "a conversation longer than the context": (
        pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="x" * 995)]),
        "prompt: has 1014 tokens; the context holds 1000, prompt and completion together",
    ),
    "zero max_tokens": (
        pb.ChatRequest(messages=[pb.ChatMessage(role="user")], sampling=pb.SamplingParams(max_tokens=0)),
        "sampling.max_tokens: is 0; must be at least 1",
    ),
    "no messages": (pb.ChatRequest(), "messages: is empty; give at least one message"),
    "too many messages": (
        pb.ChatRequest(messages=[pb.ChatMessage(role="user")] * 10 * CONTEXT_TOKENS),
        "messages: has at least 10000 tokens; the context holds 1000, prompt and completion together",
    ),
    "unknown role": (
        pb.ChatRequest(messages=[pb.ChatMessage(role="boss", content="Hi")]),
        "messages[0].role: is 'boss'; must be one of system, user, assistant, tool",
    ),
    "unset role": (
        pb.ChatRequest(messages=[pb.ChatMessage(content="Hi")]),
        "messages[0].role: is ''; must be one of system, user, assistant, tool",
    ),
    "3 MiB": (
        pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="x" * 3 * MIB)]),
        "messages[0].content: has at least 349525 tokens; the context holds 1000, prompt and completion together",
    ),
    "3 MiB in many": (
        pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="x" * 8000)] * 380),
        "messages: has at least 337777 tokens; the context holds 1000, prompt and completion together",
    ),
}


@pytest.mark.parametrize(("request_", "details"), BAD_CHATS.values(), ids=BAD_CHATS)
def test_a_bad_conversation_is_named_and_not_queued(router, stub, request_: pb.ChatRequest, details: str) -> None:
    error = failure_of(lambda: list(stub.Chat(request_, timeout=PATIENCE_S)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == details
    assert router.requests == []


def test_chat_without_a_template_points_to_generate() -> None:
    request = pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="Hi")])
    with serving(FakeRouter(), with_chat_template=False) as address, grpc.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        error = failure_of(lambda: list(stub.Chat(request, timeout=PATIENCE_S)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details().startswith("messages: ")
    assert "Generate" in error.details()


@pytest.mark.parametrize("method", ["Generate", "Chat", "Tokenize", "Detokenize", "GetModelInfo"])
def test_an_unknown_model_is_not_found_and_the_served_one_named(stub, method: str) -> None:
    request_class = pb.GetModelInfoRequest if method == "GetModelInfo" else getattr(pb, f"{method}Request")
    error = failure_of(lambda: list(getattr(stub, method)(request_class(model="gpt-2"), timeout=PATIENCE_S)))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert "'gpt-2'" in error.details()
    assert "'tiny'" in error.details()


def test_a_model_name_of_a_megabyte_is_quoted_in_part(stub) -> None:
    error = failure_of(lambda: generate(stub, pb.GenerateRequest(model="ü" * MIB, text="Hi")))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert len(error.details()) < 300


def test_detokenize_names_a_bad_token_id(stub) -> None:
    error = failure_of(lambda: stub.Detokenize(pb.DetokenizeRequest(token_ids=[1, 999]), timeout=PATIENCE_S))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "token_ids: contains 999; token ids go from 0 to 257"


def test_detokenize_takes_a_context_of_tokens_and_no_more(stub) -> None:
    assert len(stub.Detokenize(pb.DetokenizeRequest(token_ids=[65] * CONTEXT_TOKENS), timeout=PATIENCE_S).text) == 1000
    too_many = pb.DetokenizeRequest(token_ids=[65] * (CONTEXT_TOKENS + 1))
    error = failure_of(lambda: stub.Detokenize(too_many, timeout=PATIENCE_S))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "token_ids: has 1001 tokens; at most 1000 fit into the context"


CROWDS = {
    "messages": ("Chat", pb.ChatRequest(messages=[pb.ChatMessage()] * 40_000), "messages: occurs 32769 times"),
    "stop strings": (
        "Generate",
        sampled(stop=["a"] * 40_000),
        "sampling.stop: occurs 32767 times among the first 32768 fields; a request has at most 32768 fields",
    ),
    "biases": ("Generate", sampled(logit_bias=dict.fromkeys(range(20_000), 1.0)), "sampling.logit_bias: occurs 10923"),
}


@pytest.mark.parametrize(("method", "request_", "details"), CROWDS.values(), ids=CROWDS)
def test_too_many_fields_are_counted_before_they_are_read(stub, method: str, request_, details: str) -> None:
    error = failure_of(lambda: list(getattr(stub, method)(request_, timeout=PATIENCE_S)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details().startswith(details)


def test_as_many_messages_as_are_taken_reach_the_template(stub) -> None:
    request = pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="x")] * 10_000)
    error = failure_of(lambda: list(stub.Chat(request, timeout=PATIENCE_S)))
    assert error.details().startswith("messages: has at least 10000 tokens")


@pytest.mark.parametrize("method", ["Generate", "Chat", "Tokenize", "Detokenize", "GetModelInfo"])
def test_a_request_beyond_4_mib_is_refused_by_its_size(channel, method: str) -> None:
    call = channel.unary_stream(f"/drover.v1.Inference/{method}")
    error = failure_of(lambda: list(call(bytes(20 * MIB), timeout=PATIENCE_S)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert f"larger than max ({20 * MIB} vs. {4 * MIB})" in error.details()


def test_a_compressed_request_is_refused_unread(stub) -> None:
    """250 MB of zeros travel as 250 kB."""
    request = pb.TokenizeRequest(text="x" * MIB)
    error = failure_of(lambda: stub.Tokenize(request, timeout=PATIENCE_S, compression=grpc.Compression.Gzip))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "gzip" in error.details()


@pytest.mark.parametrize(("context_tokens", "mib"), [(1000, 4), (2**20, 16), (10_000_000, 64)])
def test_the_size_of_a_request_follows_the_context(context_tokens: int, mib: int) -> None:
    assert max_request_bytes(context_tokens) == mib * MIB


def test_a_prompt_that_fills_a_large_context_is_taken() -> None:
    """A million tokens take 2 MB as ids, and as text about as many bytes as may come."""
    tokens = 2**20
    router = FakeRouter(max_context_tokens=tokens)
    prompt = pb.TokenIds(ids=[200] * (tokens - 8))
    with serving(router) as address, grpc.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        generate(stub, pb.GenerateRequest(token_ids=prompt, sampling=pb.SamplingParams(max_tokens=8)))
        error = failure_of(lambda: generate(stub, pb.GenerateRequest(text="x" * 15 * tokens)))
    assert [len(request.prompt_token_ids) for request in router.requests] == [tokens - 8]
    assert error.details().startswith("prompt.text: has at least 1747626 tokens")

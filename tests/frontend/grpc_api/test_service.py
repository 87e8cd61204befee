"""What a gRPC client sees of the service, over a real socket, with a scripted router behind it."""

import grpc
import pytest

from protos.drover.v1 import inference_pb2 as pb
from protos.drover.v1 import inference_pb2_grpc
from router.errors import ResourceExhausted, Unavailable
from router.request import FinishReason, GenerationRequest, TokenDelta, TokenLogprobs
from tests.fake_router import BOS, EOS, VOCAB_SIZE, FakeRouter, echoes, fails, says, says_then_waits
from tests.loopback import CARD, failure_of, serving
from tests.processes import PATIENCE_S

CONTEXT_TOKENS = 1000


def generate(stub, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    return list(stub.Generate(request, timeout=PATIENCE_S))


def text_of(responses: list[pb.GenerateResponse]) -> str:
    return "".join(response.text for response in responses)


def token_ids_of(responses: list[pb.GenerateResponse]) -> list[int]:
    return [token_id for response in responses for token_id in response.token_ids]


def test_a_prompt_is_tokenized_and_its_continuation_streamed(router, stub) -> None:
    responses = generate(stub, pb.GenerateRequest(text="Hi"))
    assert router.requests[0].prompt_token_ids == (BOS, *b"Hi")
    assert text_of(responses) == "Hello!"
    assert [response.text for response in responses] == [*"Hello!", ""]
    assert {response.request_id for response in responses} == {router.requests[0].request_id}


def test_token_ids_are_taken_as_they_are(router, stub) -> None:
    generate(stub, pb.GenerateRequest(token_ids=pb.TokenIds(ids=[7, EOS, BOS])))
    assert router.requests[0].prompt_token_ids == (7, EOS, BOS)


def test_the_last_message_alone_has_finish_reason_and_usage(stub) -> None:
    *others, last = generate(stub, pb.GenerateRequest(text="Hi"))
    assert last.finish_reason == pb.FINISH_REASON_STOP
    assert last.usage == pb.Usage(prompt_tokens=3, completion_tokens=7)
    assert all(not other.finish_reason and not other.HasField("usage") for other in others)


def test_the_stop_token_is_in_token_ids_but_not_in_text(router, stub) -> None:
    async def stops_at_exclamation_mark(request: GenerationRequest):
        yield TokenDelta(request.request_id, tuple(b"Hello!"), finish_reason=FinishReason.STOP)

    router.script = stops_at_exclamation_mark
    responses = generate(stub, pb.GenerateRequest(text="Hi", sampling=pb.SamplingParams(stop_token_ids=[ord("!")])))
    assert text_of(responses) == "Hello"
    assert bytes(token_ids_of(responses)) == b"Hello!"
    assert router.requests[0].sampling.stop_token_ids == {ord("!")}


def test_the_last_token_at_max_tokens_is_text(stub) -> None:
    responses = generate(stub, pb.GenerateRequest(text="Hi", sampling=pb.SamplingParams(max_tokens=4)))
    assert text_of(responses) == "Hell"
    assert responses[-1].finish_reason == pb.FINISH_REASON_LENGTH
    assert responses[-1].usage.completion_tokens == 4


@pytest.mark.parametrize("tokens_per_delta", [1, 2, 3])
def test_characters_split_over_tokens_come_whole(router, stub, tokens_per_delta: int) -> None:
    said = "naïve 🦙 你好"
    router.script = says(said, tokens_per_delta=tokens_per_delta)
    responses = generate(stub, pb.GenerateRequest(text="Hi"))
    assert text_of(responses) == said
    assert bytes(token_ids_of(responses)[:-1]) == said.encode()


def test_a_character_cut_off_by_max_tokens_becomes_a_replacement_character(router, stub) -> None:
    router.script = says("🦙")
    responses = generate(stub, pb.GenerateRequest(text="Hi", sampling=pb.SamplingParams(max_tokens=2)))
    assert text_of(responses) == "\ufffd"


def test_logprobs_come_with_their_tokens(router, stub) -> None:
    async def script(request: GenerationRequest):
        logprobs = (TokenLogprobs(ord("a"), -0.5, ((ord("b"), -0.25), (ord("a"), -0.5))),)
        yield TokenDelta(request.request_id, (ord("a"),), logprobs, FinishReason.LENGTH)

    router.script = script
    [response] = generate(stub, pb.GenerateRequest(text="Hi", sampling=pb.SamplingParams(logprobs=2)))
    top = [pb.TokenAlternative(token_id=ord("b"), logprob=-0.25), pb.TokenAlternative(token_id=ord("a"), logprob=-0.5)]
    assert list(response.logprobs) == [pb.TokenLogprob(token_id=ord("a"), logprob=-0.5, top=top)]
    assert router.requests[0].sampling.logprobs == 2


def test_an_answer_with_everything_is_these_messages(router, stub) -> None:
    async def script(request: GenerationRequest):
        name = request.request_id
        yield TokenDelta(name, prompt_logprobs=(None, TokenLogprobs(72, -0.5, ((7, -0.25),))), cached_tokens=1)
        yield TokenDelta(name, (0xC3,), (TokenLogprobs(0xC3, -0.5, ()),))
        yield TokenDelta(name, (0xA9,), (TokenLogprobs(0xA9, -1.0, ((5, -0.75),)),), first=1)
        yield TokenDelta(name, (EOS,), (TokenLogprobs(EOS, -2.0, ()),), FinishReason.STOP, first=2)

    router.script = script
    sampling = pb.SamplingParams(logprobs=1, prompt_logprobs=1, seed=5)
    responses = generate(stub, pb.GenerateRequest(text="Hi", sampling=sampling))
    name = router.requests[0].request_id
    seven, five = pb.TokenAlternative(token_id=7, logprob=-0.25), pb.TokenAlternative(token_id=5, logprob=-0.75)
    assert responses == [
        pb.GenerateResponse(
            request_id=name,
            seed=5,
            prompt_logprobs=[pb.PromptLogprob(token_id=BOS), pb.PromptLogprob(token_id=72, logprob=-0.5, top=[seven])],
        ),
        pb.GenerateResponse(request_id=name, token_ids=[0xC3], logprobs=[pb.TokenLogprob(token_id=0xC3, logprob=-0.5)]),
        pb.GenerateResponse(
            request_id=name,
            token_ids=[0xA9],
            text="é",
            logprobs=[pb.TokenLogprob(token_id=0xA9, logprob=-1.0, top=[five])],
        ),
        pb.GenerateResponse(
            request_id=name,
            token_ids=[EOS],
            logprobs=[pb.TokenLogprob(token_id=EOS, logprob=-2.0)],
            finish_reason=pb.FINISH_REASON_STOP,
            stop_token_id=EOS,
            usage=pb.Usage(prompt_tokens=3, completion_tokens=3, cached_tokens=1),
        ),
    ]


def test_sampling_that_is_left_out_takes_the_documented_defaults(router, stub) -> None:
    generate(stub, pb.GenerateRequest(text="Hi"))
    sampling = router.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (256, 1.0, 1.0, 0)
    assert (sampling.stop_token_ids, sampling.logprobs) == (frozenset(), None)


def test_sampling_zeros_are_not_taken_for_left_out(router, stub) -> None:
    sampling = pb.SamplingParams(temperature=0, top_k=0, seed=0, logprobs=0)
    generate(stub, pb.GenerateRequest(text="Hi", sampling=sampling))
    given = router.requests[0].sampling
    assert (given.temperature, given.top_k, given.seed, given.logprobs) == (0.0, 0, 0, 0)


def test_each_request_without_a_seed_gets_its_own(router, stub) -> None:
    for _ in range(2):
        generate(stub, pb.GenerateRequest(text="Hi"))
    first, second = router.requests
    assert first.sampling.seed != second.sampling.seed
    assert first.request_id != second.request_id


def test_max_tokens_is_by_default_what_the_context_still_holds(router, stub) -> None:
    generate(stub, pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * (CONTEXT_TOKENS - 5))))
    assert router.requests[0].sampling.max_tokens == 5


def test_a_conversation_is_formatted_with_the_chat_template(router, stub) -> None:
    router.script = echoes()
    messages = [pb.ChatMessage(role="system", content="Be nice."), pb.ChatMessage(role="user", content="Hi")]
    responses = list(stub.Chat(pb.ChatRequest(messages=messages), timeout=PATIENCE_S))
    assert text_of(responses) == "system: Be nice.\nuser: Hi\nassistant: "


def test_tokenize_and_detokenize_are_inverses(stub) -> None:
    ids = list(stub.Tokenize(pb.TokenizeRequest(text="Grüße"), timeout=PATIENCE_S).token_ids)
    assert ids == [BOS, *"Grüße".encode()]
    assert stub.Detokenize(pb.DetokenizeRequest(token_ids=ids), timeout=PATIENCE_S).text == "<|begin|>Grüße"
    assert list(stub.Tokenize(pb.TokenizeRequest(text="a", add_bos=False), timeout=PATIENCE_S).token_ids) == [97]


def test_a_long_text_is_tokenized_as_a_short_one_is(stub) -> None:
    text = "Grüße " * 10_000
    token_ids = stub.Tokenize(pb.TokenizeRequest(text=text, add_bos=False), timeout=PATIENCE_S).token_ids
    assert bytes(token_ids).decode() == text


def test_model_info_says_what_is_served(stub) -> None:
    info = stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=PATIENCE_S)
    assert (info.model, info.vocab_size, info.max_context_tokens) == ("tiny", VOCAB_SIZE, CONTEXT_TOKENS)
    assert (list(info.eos_token_ids), info.bos_token_id, info.has_chat_template) == ([EOS], BOS, True)
    assert (info.num_layers, info.num_moe_layers, info.num_experts, info.experts_per_token) == (4, 2, 16, 1)
    assert (info.total_parameters, info.active_parameters, info.dtype) == (10**6, 10**5, "float32")
    assert stub.GetModelInfo(pb.GetModelInfoRequest(model=CARD.name), timeout=PATIENCE_S) == info


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (ResourceExhausted("the queue is full"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (Unavailable("shard 3 is down"), grpc.StatusCode.UNAVAILABLE),
    ],
)
def test_what_was_made_before_a_failure_is_delivered(router, stub, failure: Exception, code: grpc.StatusCode) -> None:
    router.script = fails(failure, after="Hel")
    received: list[pb.GenerateResponse] = []
    error = failure_of(lambda: received.extend(stub.Generate(pb.GenerateRequest(text="Hi"), timeout=PATIENCE_S)))
    assert text_of(received) == "Hel"
    assert (error.code(), error.details()) == (code, str(failure))


def test_an_error_delta_ends_the_stream_with_its_error(router, stub) -> None:
    async def script(request: GenerationRequest):
        yield TokenDelta(request.request_id, error=Unavailable("router 0 is down"))

    router.script = script
    error = failure_of(lambda: generate(stub, pb.GenerateRequest(text="Hi")))
    assert error.code() is grpc.StatusCode.UNAVAILABLE


def test_a_fault_of_the_program_is_internal_and_keeps_its_secrets(router, stub) -> None:
    router.script = fails(ZeroDivisionError("secret"))
    error = failure_of(lambda: generate(stub, pb.GenerateRequest(text="Hi")))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "ZeroDivisionError" in error.details()
    assert "secret" not in error.details()


def test_cancelling_a_call_closes_the_routers_stream(router, stub) -> None:
    router.script = says_then_waits("Hel")
    call = stub.Generate(pb.GenerateRequest(text="Hi"), timeout=PATIENCE_S)
    assert next(call).text == "Hel"
    call.cancel()
    assert router.closed.wait(PATIENCE_S)
    assert router.endings == ["cancelled"]


def test_a_passed_deadline_closes_the_routers_stream(router, stub) -> None:
    router.script = says_then_waits("Hel")
    error = failure_of(lambda: list(stub.Generate(pb.GenerateRequest(text="Hi"), timeout=0.5)))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert router.closed.wait(PATIENCE_S)


def test_a_vanished_client_closes_the_routers_stream() -> None:
    router = FakeRouter(says_then_waits("Hel"))
    with serving(router) as address:
        with grpc.insecure_channel(address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            assert next(stub.Generate(pb.GenerateRequest(text="Hi"), timeout=PATIENCE_S)).text == "Hel"
        assert router.closed.wait(PATIENCE_S)

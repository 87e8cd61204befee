"""The Python client against a real server on loopback."""

import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import grpc
import pytest

from client import (
    Client,
    ClientError,
    DeadlineExceeded,
    Delta,
    InvalidRequest,
    Message,
    NotFound,
    PromptLogprob,
    ResourceExhausted,
    ServerUnavailable,
    TokenAlternative,
    TokenLogprob,
    Usage,
)
from protos.drover.v1 import inference_pb2 as pb
from router import errors
from router.request import FinishReason, GenerationRequest, TokenDelta, TokenLogprobs
from tests.fake_router import BOS, EOS, FakeRouter, echoes, fails, says, says_then_waits
from tests.loopback import serving
from tests.processes import PATIENCE_S


@pytest.fixture(scope="module")
def router() -> FakeRouter:
    return FakeRouter()


@pytest.fixture(scope="module")
def connected(router: FakeRouter) -> Iterator[Client]:
    with serving(router) as address, Client(address) as client:
        yield client


@pytest.fixture
def client(router: FakeRouter, connected: Client) -> Client:
    router.script = says("Hello!")
    router.ready = True
    router.requests.clear()
    router.closed.clear()
    return connected


def test_generate_streams_deltas(client: Client) -> None:
    *others, last = client.generate("Hi", timeout_s=PATIENCE_S)
    assert [delta.text for delta in others] == [*"Hello!"]
    assert [delta.finish_reason for delta in others] == [None] * 6
    usage = Usage(prompt_tokens=3, completion_tokens=7)
    assert last == Delta(last.request_id, "", (EOS,), (), "stop", usage, stop_token_id=EOS)


def test_a_prompt_may_be_token_ids(client: Client, router: FakeRouter) -> None:
    list(client.generate([1, 2, EOS], timeout_s=PATIENCE_S))
    assert router.requests[0].prompt_token_ids == (1, 2, EOS)


def test_sampling_reaches_the_router(client: Client, router: FakeRouter) -> None:
    list(
        client.generate(
            "Hi",
            max_tokens=3,
            temperature=0.5,
            top_p=0.25,
            top_k=7,
            seed=2**64 - 1,
            stop_token_ids=[9],
            logprobs=0,
            timeout_s=PATIENCE_S,
        )
    )
    sampling = router.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (3, 0.5, 0.25, 7)
    assert (sampling.seed, sampling.stop_token_ids, sampling.logprobs) == (2**64 - 1, {9}, 0)


def test_every_other_sampling_field_arrives_too(client: Client, router: FakeRouter) -> None:
    deltas = list(
        client.generate(
            "Hi",
            min_p=0.125,
            presence_penalty=-0.5,
            frequency_penalty=0.25,
            repetition_penalty=1.5,
            logit_bias={7: 1.5, 5: -100},
            min_tokens=2,
            stop=["lo", "never"],
            ignore_eos=True,
            n=2,
            prompt_logprobs=3,
            timeout_s=PATIENCE_S,
        )
    )
    first, second = (request.sampling for request in router.requests)
    assert (first.min_p, first.presence_penalty, first.frequency_penalty) == (0.125, -0.5, 0.25)
    assert (first.repetition_penalty, first.logit_bias) == (1.5, ((5, -100.0), (7, 1.5)))
    assert (first.min_tokens, first.ignore_eos, first.prompt_logprobs) == (2, True, 3)
    assert second.prompt_logprobs is None
    assert [(d.index, d.stop_string) for d in deltas if d.finish_reason] == [(0, "lo"), (1, "lo")]


def test_prompt_logprobs_are_plain_data(client: Client, router: FakeRouter) -> None:
    async def script(request: GenerationRequest):
        yield TokenDelta(request.request_id, prompt_logprobs=(None, TokenLogprobs(72, -0.5, ((66, -0.25),))))
        yield TokenDelta(request.request_id, (65,), finish_reason=FinishReason.LENGTH, cached_tokens=2)

    router.script = script
    first, last = client.generate("Hi", prompt_logprobs=1, timeout_s=PATIENCE_S)
    assert first.prompt_logprobs == (
        PromptLogprob(BOS, None, ()),
        PromptLogprob(72, -0.5, (TokenAlternative(66, -0.25),)),
    )
    assert last.usage == Usage(prompt_tokens=3, completion_tokens=1, cached_tokens=2)


def test_an_answer_that_is_missing_is_noticed(client: Client, router: FakeRouter) -> None:
    """A server that ends the stream after one of two answers has not done what it was asked for."""
    stream = client.generate("Hi", n=2, timeout_s=PATIENCE_S)
    stream._call = client._inference.Generate(pb.GenerateRequest(text="Hi"), timeout=PATIENCE_S)
    with pytest.raises(ClientError, match="without a finish reason"):
        list(stream)


def test_none_means_the_servers_default(client: Client, router: FakeRouter) -> None:
    list(client.generate("Hi", max_tokens=None, temperature=None, timeout_s=PATIENCE_S))
    assert (router.requests[0].sampling.max_tokens, router.requests[0].sampling.temperature) == (256, 1.0)


def test_logprobs_are_plain_data(client: Client, router: FakeRouter) -> None:
    async def script(request: GenerationRequest):
        yield TokenDelta(
            request.request_id, (65,), (TokenLogprobs(65, -0.5, ((66, -0.25),)),), finish_reason=FinishReason.LENGTH
        )

    router.script = script
    [delta] = client.generate("Hi", logprobs=1, timeout_s=PATIENCE_S)
    assert delta.logprobs == (TokenLogprob(65, -0.5, (TokenAlternative(66, -0.25),)),)
    assert delta.finish_reason == "length"


@pytest.mark.parametrize("messages", [[("user", "Hi")], [Message("user", "Hi")]])
def test_chat_takes_messages_or_pairs(client: Client, router: FakeRouter, messages: list[tuple[str, str]]) -> None:
    router.script = echoes()
    assert "".join(delta.text for delta in client.chat(messages, timeout_s=PATIENCE_S)) == "user: Hi\nassistant: "


def test_tokenize_and_detokenize(client: Client) -> None:
    assert client.tokenize("Hi", timeout_s=PATIENCE_S) == [BOS, *b"Hi"]
    assert client.tokenize("Hi", add_bos=False, timeout_s=PATIENCE_S) == [*b"Hi"]
    assert client.detokenize([*b"Hi", EOS], timeout_s=PATIENCE_S) == "Hi<|end|>"


def test_model_info(client: Client) -> None:
    info = client.model_info(timeout_s=PATIENCE_S)
    assert (info.model, info.max_context_tokens, info.eos_token_ids, info.bos_token_id) == ("tiny", 1000, (EOS,), BOS)


def test_health_tells_a_live_server_from_a_ready_model(client: Client, router: FakeRouter) -> None:
    assert client.health(timeout_s=PATIENCE_S) == "SERVING"
    router.ready = False
    assert client.health(timeout_s=PATIENCE_S) == "NOT_SERVING"
    assert client.health("", timeout_s=PATIENCE_S) == "SERVING"


def test_closing_the_stream_cancels_the_answer(client: Client, router: FakeRouter) -> None:
    router.script = says_then_waits("Hel")
    stream = client.generate("Hi", timeout_s=PATIENCE_S)
    assert next(stream).text == "Hel"
    stream.close()
    assert router.closed.wait(PATIENCE_S)
    assert list(stream) == []


def test_leaving_the_streams_context_cancels_the_answer(client: Client, router: FakeRouter) -> None:
    router.script = says_then_waits("Hel")
    with client.generate("Hi", timeout_s=PATIENCE_S) as stream:
        next(stream)
    assert router.closed.wait(PATIENCE_S)


def test_dropping_the_stream_cancels_the_answer(client: Client, router: FakeRouter) -> None:
    router.script = says_then_waits("Hel")
    next(client.generate("Hi", timeout_s=PATIENCE_S))
    assert router.closed.wait(PATIENCE_S)


def test_closing_a_finished_stream_is_harmless(client: Client) -> None:
    with client.generate("Hi", timeout_s=PATIENCE_S) as stream:
        assert len(list(stream)) == 7
    assert list(stream) == []


@pytest.mark.parametrize(
    ("failure", "error_type"),
    [
        (errors.ResourceExhausted("the queue is full"), ResourceExhausted),
        (errors.Unavailable("shard 3 is down"), ServerUnavailable),
    ],
)
def test_an_error_comes_after_what_was_made(
    client: Client, router: FakeRouter, failure: Exception, error_type: type[ClientError]
) -> None:
    router.script = fails(failure, after="Hel")
    stream = client.generate("Hi", timeout_s=PATIENCE_S, resume_s=0)
    assert next(stream).text == "Hel"
    with pytest.raises(error_type, match=f"^{failure}$"):
        next(stream)


@pytest.mark.parametrize(("hint_s", "told_s"), [(None, None), (0.0204, 0.021), (3.0, 3.0)])
def test_a_full_queue_says_when_to_come_again(
    client: Client, router: FakeRouter, hint_s: float | None, told_s: float | None
) -> None:
    router.script = fails(errors.ResourceExhausted("the queue is full", retry_after_s=hint_s))
    with pytest.raises(ResourceExhausted) as error:
        next(client.generate("Hi", timeout_s=PATIENCE_S))
    assert error.value.retry_after_s == told_s


def test_a_wrong_field_is_an_invalid_request(client: Client) -> None:
    with pytest.raises(InvalidRequest, match=r"^sampling\.top_p: is 2; ") as error:
        next(client.generate("Hi", top_p=2, timeout_s=PATIENCE_S))
    assert error.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_an_unknown_model_or_service_is_not_found(client: Client) -> None:
    with pytest.raises(NotFound, match="'gpt-2'"):
        client.model_info(model="gpt-2", timeout_s=PATIENCE_S)
    with pytest.raises(NotFound, match="'nonsense'"):
        client.health("nonsense", timeout_s=PATIENCE_S)


def test_the_deadline_is_the_clients_own(client: Client, router: FakeRouter) -> None:
    router.script = says_then_waits("Hel")
    with pytest.raises(DeadlineExceeded):
        list(client.generate("Hi", timeout_s=0.3))


UNSENDABLE: dict[str, Callable[[Client], Any]] = {
    "sampling.seed": lambda client: client.generate("Hi", seed=-1),
    "sampling.max_tokens": lambda client: client.generate("Hi", max_tokens=2**31),
    "sampling.temperature": lambda client: client.generate("Hi", temperature="hot"),
    "sampling.n": lambda client: client.generate("Hi", n=2**31),
    "sampling.stop": lambda client: client.generate("Hi", stop="ab"),
    "sampling.logit_bias": lambda client: client.generate("Hi", logit_bias={-1: 1.0}),
    "sampling.stop_token_ids": lambda client: client.generate("Hi", stop_token_ids=[-1]),
    "prompt.token_ids": lambda client: client.generate([1, -1]),
    "prompt.text": lambda client: client.generate("\ud83e"),
    "messages[1].content": lambda client: client.chat([("user", "Hi"), ("user", "\ud83e")]),
    "token_ids": lambda client: client.detokenize([2**32]),
    "text": lambda client: client.tokenize("\ud83e"),
}


@pytest.mark.parametrize("field", UNSENDABLE)
def test_what_cannot_even_be_sent_names_its_field(client: Client, field: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        UNSENDABLE[field](client)
    assert str(error.value).startswith(f"{field}: is ")


def test_an_unknown_sampling_parameter_is_refused(client: Client) -> None:
    with pytest.raises(TypeError, match="'max_token'"):
        client.generate("Hi", max_token=3)


def test_no_server_is_said_with_the_address() -> None:
    with (
        Client("127.0.0.1:1") as client,
        pytest.raises(ServerUnavailable, match=r"^no server answers at 127\.0\.0\.1:1 "),
    ):
        client.model_info(timeout_s=PATIENCE_S)


def test_a_server_that_goes_away_mid_stream_is_unavailable() -> None:
    with ExitStack() as server:
        address = server.enter_context(serving(FakeRouter(says_then_waits("Hel"))))
        with Client(address) as client:
            stream = client.generate("Hi", timeout_s=PATIENCE_S, resume_s=0)
            assert next(stream).text == "Hel"
            server.close()
            with pytest.raises(ServerUnavailable):
                next(stream)


@pytest.mark.parametrize(
    ("code", "details"),
    [
        (grpc.StatusCode.CANCELLED, "Stream removed (RST_STREAM (Received RST_STREAM with error code 8))"),
        (
            grpc.StatusCode.NOT_FOUND,
            "Application metadata not set. Ping /ray.serve.RayServeAPIService/ListApplications for available "
            "applications.",
        ),
        (grpc.StatusCode.UNKNOWN, "Received http2 header with status: 500"),
    ],
)
def test_what_haproxy_says_without_a_replica_is_unavailable(code: grpc.StatusCode, details: str) -> None:
    def end(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        context.abort(code, details)
        yield b""

    server = grpc.server(ThreadPoolExecutor(1))
    methods = {"Generate": grpc.unary_stream_rpc_method_handler(end)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("drover.v1.Inference", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with (
            Client(f"127.0.0.1:{port}") as client,
            pytest.raises(ServerUnavailable, match=rf"127\.0\.0\.1:{port} broke the call off"),
        ):
            list(client.generate("Hi", timeout_s=PATIENCE_S, resume_s=0))
    finally:
        server.stop(None)


def test_what_the_client_cancels_itself_is_no_fault_of_the_server() -> None:
    with serving(FakeRouter(says_then_waits("Hel"))) as address:
        client = Client(address)
        stream = client.generate("Hi", timeout_s=PATIENCE_S)
        assert next(stream).text == "Hel"
        client.close()
        with pytest.raises(ClientError) as error:
            next(stream)
    assert error.value.code is grpc.StatusCode.CANCELLED


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(NotFound(grpc.StatusCode.NOT_FOUND, "no such model")))
    assert (type(error), error.code, str(error)) == (NotFound, grpc.StatusCode.NOT_FOUND, "no such model")

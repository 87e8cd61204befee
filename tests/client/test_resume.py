"""Streams of the client whose server fails and comes back: the reader notices nothing but a pause."""

import asyncio
import re
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import grpc
import pytest

from client import Client, Delta, DeltaStream, ServerUnavailable
from client import client as client_module
from cluster.free_ports import free_ports
from protos.drover.v1 import inference_pb2 as pb
from router import errors
from router.request import FinishReason, GenerationRequest, TokenDelta, TokenLogprobs
from tests.command import ROOT
from tests.fake_router import BOS, EOS, FakeRouter, Script, fails, says, says_then_waits
from tests.loopback import failure_of, serving
from tests.processes import PATIENCE_S


@pytest.fixture
def router() -> FakeRouter:
    return FakeRouter()


@pytest.fixture
def client(router: FakeRouter) -> Iterator[Client]:
    with serving(router) as address, Client(address) as client:
        yield client


def breaks(router: FakeRouter, then: Script, *times: str, error: Exception | None = None) -> None:
    """Answers end with an error after each of these pieces of text; then the script goes on."""
    pieces = iter(times)

    async def script(request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        piece = next(pieces, None)
        if piece is None:
            async for delta in then(request):
                yield delta
            return
        for first, byte in enumerate(piece.encode(), len(request.made)):
            yield TokenDelta(request.request_id, (byte,), first=first)
        raise error or errors.Unavailable("a part died")

    router.script = script


def text_of(deltas: list[Delta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)


def test_a_stream_that_breaks_again_and_again_is_one_stream(client: Client, router: FakeRouter) -> None:
    breaks(router, says("Hello, world"), "Hel", "", "lo, ")
    with client.generate("Hi", temperature=0.5, timeout_s=PATIENCE_S) as stream:
        deltas = list(stream)
    assert text_of(deltas) == "Hello, world"
    assert [token_id for delta in deltas for token_id in delta.token_ids] == [*b"Hello, world", EOS]
    assert {delta.request_id for delta in deltas} == {router.requests[0].request_id}
    assert [bytes(request.made) for request in router.requests] == [b"", b"Hel", b"Hel", b"Hello, "]
    assert len({request.sampling.seed for request in router.requests}) == 1
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.completion_tokens == len("Hello, world") + 1
    assert len(stream.gaps_s) == 2


def test_a_conversation_is_resumed_too_and_stop_strings_with_it(client: Client, router: FakeRouter) -> None:
    breaks(router, says("one STAR two STOP three"), "one ST")
    deltas = list(client.chat([("user", "Hi")], stop=["STOP"], timeout_s=PATIENCE_S))
    assert (text_of(deltas), deltas[-1].stop_string) == ("one STAR two ", "STOP")
    assert bytes(router.requests[1].made) == b"one "  # the rest waited for what follows it


def test_of_several_answers_each_goes_on_where_it_was(client: Client, router: FakeRouter) -> None:
    """Answer 0 is complete when answer 1 breaks."""

    first_is_over = asyncio.Event()

    async def script(request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        if len(router.requests) == 2 and request is router.requests[1]:
            yield TokenDelta(request.request_id, tuple(b"Hel"))
            await first_is_over.wait()
            raise errors.Unavailable("a part died")
        try:
            async for delta in says("Hello!")(request):
                yield delta
        finally:
            first_is_over.set()

    router.script = script
    deltas = list(client.generate("Hi", n=2, timeout_s=PATIENCE_S))
    assert (text_of(deltas, 0), text_of(deltas, 1)) == ("Hello!", "Hello!")
    assert [delta.index for delta in deltas if delta.finish_reason] == [0, 1]
    assert [bytes(request.made) for request in router.requests] == [b"", b"", b"Hel"]


def test_log_probabilities_come_once(client: Client, router: FakeRouter) -> None:
    async def script(request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        told = (None, TokenLogprobs(72, -0.5, ()), TokenLogprobs(105, -0.25, ()))
        if len(router.requests) == 1:
            yield TokenDelta(request.request_id, prompt_logprobs=told[:2])
            raise errors.Unavailable("a part died")
        if len(router.requests) == 2:
            yield TokenDelta(request.request_id, (65,), (TokenLogprobs(65, -1.0, ()),), prompt_logprobs=told)
            raise errors.Unavailable("a part died")
        yield TokenDelta(
            request.request_id, (66,), (TokenLogprobs(66, -2.0, ()),), finish_reason=FinishReason.LENGTH, first=1
        )

    router.script = script
    deltas = list(client.generate("Hi", prompt_logprobs=0, logprobs=0, timeout_s=PATIENCE_S))
    assert [entry.token_id for delta in deltas for entry in delta.prompt_logprobs] == [BOS, 72, 105]
    assert [entry.logprob for delta in deltas for entry in delta.logprobs] == [-1.0, -2.0]


@pytest.mark.parametrize("code", [grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE])
def test_a_server_that_goes_away_and_comes_back_is_noticed_as_a_gap_alone(code: grpc.StatusCode) -> None:
    """HAProxy breaks calls off with CANCELLED; where the whole server goes, there is no connection for a while."""
    [port] = free_ports(1)
    with ExitStack() as first, Client(f"127.0.0.1:{port}") as client:
        router = FakeRouter(says_then_waits("Hel"))
        first.enter_context(serving(router, port=port))
        stream = client.generate("Hi", temperature=0, timeout_s=PATIENCE_S)
        assert next(stream).text == "Hel"
        if code is grpc.StatusCode.UNAVAILABLE:
            first.close()  # its calls are cancelled, and the port is closed
            gone_s = time.monotonic()
            with serving(FakeRouter(says("Hello!")), port=port):
                assert text_of(list(stream)) == "lo!"
                assert stream.gaps_s[0] <= time.monotonic() - gone_s + 0.5
        else:
            router.script = says("Hello!")
            stream._call = _cancelled_by_the_server(stream._call)
            assert text_of(list(stream)) == "lo!"
            assert router.closed.wait(PATIENCE_S)  # what ran of the broken call has ended


class _cancelled_by_the_server(Iterator[Any]):
    def __init__(self, call: Any) -> None:
        self._call = call

    def __next__(self) -> Any:
        raise _Reset

    def cancel(self) -> None:
        self._call.cancel()


class _Reset(grpc.RpcError):
    @classmethod
    def code(cls) -> grpc.StatusCode:
        return grpc.StatusCode.CANCELLED

    @classmethod
    def details(cls) -> str:
        return "Stream removed (RST_STREAM (Received RST_STREAM with error code 8))"


def test_a_queue_that_is_full_now_is_waited_for(client: Client, router: FakeRouter) -> None:
    breaks(router, says("Hello!"), "Hel")
    original, refused = router.script, []

    async def script(request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        if request.made and len(refused) < 2:
            refused.append(request)
            raise errors.ResourceExhausted("the queue is full", retry_after_s=0.1)
        async for delta in original(request):
            yield delta

    router.script = script
    assert text_of(list(client.generate("Hi", timeout_s=PATIENCE_S))) == "Hello!"
    assert len(refused) == 2


@pytest.mark.parametrize("resume_s", [0, 0.2])
def test_what_cannot_be_resumed_in_time_ends_with_the_error_that_broke_it(
    client: Client, router: FakeRouter, resume_s: float
) -> None:
    breaks(router, fails(errors.Unavailable("still down")), "Hel")
    stream = client.generate("Hi", timeout_s=PATIENCE_S, resume_s=resume_s)
    assert next(stream).text == "H"
    with pytest.raises(ServerUnavailable, match=r"^a part died$"):
        list(stream)
    assert (len(router.requests) > 1) is (resume_s > 0)


def test_an_attempt_that_hangs_is_given_up_in_time_too(client: Client, router: FakeRouter) -> None:
    breaks(router, says_then_waits(""), "Hel")
    stream = client.generate("Hi", timeout_s=PATIENCE_S, resume_s=0.5)
    assert next(stream).text == "H"
    began_s = time.monotonic()
    with pytest.raises(ServerUnavailable, match=r"^a part died$"):
        list(stream)
    assert time.monotonic() - began_s < PATIENCE_S / 2
    assert len(router.requests) == 2
    assert router.closed.wait(PATIENCE_S)  # the server has heard of it


def test_an_attempt_that_has_answered_may_take_its_time(client: Client, router: FakeRouter) -> None:
    breaks(router, says("Hello!"), "Hel")
    stream = client.generate("Hi", timeout_s=PATIENCE_S)
    assert "".join(next(stream).text for _ in range(4)) == "Hell"
    stream._call._give_up()  # as a timer does that has just run out
    assert text_of(list(stream)) == "o!"


def test_an_error_that_another_call_would_get_too_is_not_tried_again(client: Client, router: FakeRouter) -> None:
    breaks(router, says("Hello!"), "Hel", error=errors.Internal("its logits are not finite"))
    with pytest.raises(Exception, match="not finite"):
        list(client.generate("Hi", timeout_s=PATIENCE_S))
    assert len(router.requests) == 1


def test_what_the_server_refuses_before_it_began_is_told_at_once(client: Client, router: FakeRouter) -> None:
    router.script = fails(errors.Unavailable("shard 3 is down"))
    with pytest.raises(ServerUnavailable, match=r"^shard 3 is down$"):
        list(client.generate("Hi", timeout_s=PATIENCE_S))
    assert len(router.requests) == 1


def test_closing_ends_the_attempts(client: Client, router: FakeRouter) -> None:
    breaks(router, fails(errors.Unavailable("still down")), "Hel")
    stream = client.generate("Hi", timeout_s=PATIENCE_S)
    read: list[Delta] = []
    reading = threading.Thread(target=lambda: read.extend(stream))
    reading.start()
    while len(router.requests) < 3:
        time.sleep(0.01)
    stream.close()
    reading.join(PATIENCE_S)
    assert not reading.is_alive()
    assert text_of(read) == "Hel"


def test_the_calls_own_timeout_counts_over_all_attempts(client: Client, router: FakeRouter) -> None:
    breaks(router, says_then_waits("Hel"), "H")
    began_s = time.monotonic()
    with pytest.raises(Exception, match="did not finish in time"):
        list(client.generate("Hi", timeout_s=0.4))
    assert time.monotonic() - began_s < PATIENCE_S / 2


def test_a_new_call_waits_for_a_server_that_was_there_before() -> None:
    [port] = free_ports(1)
    with Client(f"127.0.0.1:{port}") as client, pytest.raises(ServerUnavailable, match="no server answers"):
        next(client.generate("Hi", timeout_s=PATIENCE_S))
    with Client(f"127.0.0.1:{port}") as client:
        with serving(FakeRouter(), port=port):
            assert text_of(list(client.generate("Hi", timeout_s=PATIENCE_S))) == "Hello!"
        answers: list[Delta] = []
        stream: DeltaStream = client.generate("Hi", timeout_s=PATIENCE_S)
        waiting = threading.Thread(target=lambda: answers.extend(stream))
        waiting.start()
        with serving(FakeRouter(), port=port):
            waiting.join(PATIENCE_S)
        assert text_of(answers) == "Hello!"


def test_the_example_for_clients_with_the_stubs_alone_does_what_it_says(client: Client, router: FakeRouter) -> None:
    page = (ROOT / "docs" / "healing.md").read_text()
    [example] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {"grpc": grpc, "time": time}
    exec(example, names)
    breaks(router, says("Hello, world"), "Hel", "", "lo, ")
    messages = list(names["generate"](client._inference, pb.GenerateRequest(text="Hi")))
    assert "".join(message.text for message in messages) == "Hello, world"
    assert [bytes(request.made) for request in router.requests] == [b"", b"Hel", b"Hel", b"Hello, "]


def test_a_wrong_resume_is_refused_by_its_path(client: Client) -> None:
    resume = pb.Resume(request_id="0" * 32, received=[pb.Received(token_ids=[70000])])
    request = pb.GenerateRequest(text="Hi", sampling=pb.SamplingParams(seed=1), resume=resume)
    error: Any = failure_of(lambda: list(client._inference.Generate(request, timeout=PATIENCE_S)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details().startswith("resume.received[0].token_ids: contains 70000; ")


@contextmanager
def path_to(address: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Another address of a server, and what cuts its connections so far: they stay open, but nothing passes."""
    host, _, port = address.rpartition(":")
    cut: set[socket.socket] = set()
    ends: list[socket.socket] = []

    def pass_on(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if source not in cut:
                    target.sendall(data)

    def accept() -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection((host, int(port)))
                ends.extend((near, far))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=pass_on, args=pair, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}", lambda: cut.update(ends)
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            for end in ends:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()


def test_a_connection_through_which_nothing_comes_any_more_is_given_up(
    router: FakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host was lost, or the network between: nobody has closed the connection."""
    monkeypatch.setattr(client_module, "PING_S", 0.6)
    monkeypatch.setattr(client_module, "PING_TIMEOUT_S", 0.3)
    router.script = says_then_waits("Hel")
    with serving(router) as address, path_to(address) as (path, cut), Client(path) as client:
        stream = client.generate("Hi", temperature=0, timeout_s=PATIENCE_S)
        assert next(stream).text == "Hel"
        cut()
        router.script = says("Hello!")
        assert text_of(list(stream)) == "lo!"
        assert router.closed.wait(PATIENCE_S)  # the new call has ended the broken one

"""Several answers to one prompt, and stop strings, as a gRPC client sees them; the router is scripted."""

import asyncio
from collections.abc import AsyncGenerator

import grpc
import pytest

from protos.drover.v1 import inference_pb2 as pb
from router.errors import ResourceExhausted, Unavailable
from router.request import FinishReason, GenerationRequest, TokenDelta
from router.sampling.noise import derived_seed
from tests.fake_router import EOS, fails, says, says_then_waits
from tests.loopback import failure_of
from tests.processes import PATIENCE_S


def generate(stub, **sampling) -> list[pb.GenerateResponse]:
    request = pb.GenerateRequest(text="Hi", sampling=pb.SamplingParams(**sampling))
    return list(stub.Generate(request, timeout=PATIENCE_S))


def index_of(request: GenerationRequest) -> int:
    return int(request.request_id.partition("-")[2] or 0)


def each(*scripts):
    """A script for each answer."""

    def script(request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        return scripts[index_of(request)](request)

    return script


def test_every_answer_has_its_own_text_reason_and_usage(router, stub) -> None:
    router.script = each(says("one"), says("and two"), says("3"))
    responses = generate(stub, n=3, max_tokens=5)
    assert {response.request_id for response in responses} == {router.requests[0].request_id}
    texts = ["".join(r.text for r in responses if r.index == index) for index in range(3)]
    last = [[r for r in responses if r.index == index][-1] for index in range(3)]
    assert texts == ["one", "and t", "3"]
    assert [r.finish_reason for r in last] == [pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH, pb.FINISH_REASON_STOP]
    assert [r.usage.completion_tokens for r in last] == [4, 5, 2]
    assert [r.stop_token_id for r in last] == [EOS, 0, EOS]
    assert sum(bool(response.finish_reason) for response in responses) == 3


def test_the_first_keeps_the_seed_and_the_others_derive_theirs(router, stub) -> None:
    generate(stub, n=3, seed=7, prompt_logprobs=2)
    by_index = sorted(router.requests, key=index_of)
    assert [request.sampling.seed for request in by_index] == [7, derived_seed(7, 1), derived_seed(7, 2)]
    assert [request.sampling.prompt_logprobs for request in by_index] == [2, None, None]
    assert len({request.request_id for request in by_index}) == 3


def test_a_fast_answer_does_not_wait_for_a_slow_one(router, stub) -> None:
    router.script = each(says_then_waits("slow"), says("fast"))
    request = pb.GenerateRequest(text="Hi", sampling=pb.SamplingParams(n=2))
    call = stub.Generate(request, timeout=PATIENCE_S)
    seen = []
    for response in call:
        seen.append(response)
        if response.index == 1 and response.finish_reason:
            break
    call.cancel()
    assert "".join(response.text for response in seen if response.index == 1) == "fast"
    assert router.closed.wait(PATIENCE_S)


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (ResourceExhausted("256 requests are waiting already"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (Unavailable("shard 3 is down"), grpc.StatusCode.UNAVAILABLE),
    ],
)
def test_one_that_fails_ends_all(router, stub, failure: Exception, code: grpc.StatusCode) -> None:
    open_now, closed = [], []

    def waits(request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        async def script() -> AsyncGenerator[TokenDelta, None]:
            open_now.append(request.request_id)
            try:
                yield TokenDelta(request.request_id, tuple(b"Hel"))
                await asyncio.Event().wait()
            finally:
                closed.append(request.request_id)

        return script()

    router.script = each(waits, fails(failure), waits)
    error = failure_of(lambda: generate(stub, n=3))
    assert (error.code(), error.details()) == (code, str(failure))
    router.script = says("Hello!")
    generate(stub)  # the event loop has done what was due before
    assert sorted(closed) == sorted(open_now)


def test_cancelling_a_call_ends_every_answer(router, stub) -> None:
    running = 3
    all_closed = asyncio.Event()

    async def script(request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        nonlocal running
        try:
            yield TokenDelta(request.request_id, tuple(b"Hel"))
            await asyncio.Event().wait()
        finally:
            running -= 1
            if not running:
                all_closed.set()

    router.script = script
    call = stub.Generate(pb.GenerateRequest(text="Hi", sampling=pb.SamplingParams(n=3)), timeout=PATIENCE_S)
    assert {next(call).index for _ in range(3)} == {0, 1, 2}
    call.cancel()
    assert router.closed.wait(PATIENCE_S)
    router.script = says("Hello!")
    generate(stub)  # the event loop has done what was due before
    assert all_closed.is_set()


def test_a_stop_string_ends_the_answer_and_the_routers_work(router, stub) -> None:
    router.script = says_then_waits("So it is. The end. And then")
    responses = generate(stub, stop=["The end", "never"])
    assert "".join(response.text for response in responses) == "So it is. "
    last = responses[-1]
    assert (last.finish_reason, last.stop_string) == (pb.FINISH_REASON_STOP, "The end")
    assert last.usage == pb.Usage(prompt_tokens=3, completion_tokens=len("So it is. The end"))
    assert router.closed.wait(PATIENCE_S)
    assert router.endings == ["stop"]


def test_a_stop_string_ends_its_own_answer_only(router, stub) -> None:
    router.script = each(says("a b c"), says("abc"))
    responses = generate(stub, n=2, stop=[" "])
    texts = ["".join(r.text for r in responses if r.index == index) for index in range(2)]
    assert texts == ["a", "abc"]
    assert router.endings == ["stop"]  # the other one was ended by the router


def test_a_stop_token_is_named(router, stub) -> None:
    async def stops(request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        yield TokenDelta(request.request_id, tuple(b"Hi!"), finish_reason=FinishReason.STOP)

    router.script = stops
    last = generate(stub, stop_token_ids=[ord("!")])[-1]
    assert (last.stop_token_id, last.WhichOneof("matched_stop")) == (ord("!"), "stop_token_id")


def test_new_fields_that_are_left_out_take_the_documented_defaults(router, stub) -> None:
    generate(stub)
    [request] = router.requests
    sampling = request.sampling
    assert (sampling.min_p, sampling.presence_penalty, sampling.frequency_penalty) == (0.0, 0.0, 0.0)
    assert (sampling.repetition_penalty, sampling.logit_bias, sampling.min_tokens) == (1.0, (), 0)
    assert (sampling.ignore_eos, sampling.prompt_logprobs) == (False, None)

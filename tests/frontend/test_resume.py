"""A call whose stream broke goes on where its client stopped reading: same tokens, same text, nothing twice."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend import answer as answer_module
from frontend.answer import Answer, AnswerDelta, Usage
from frontend.answer_params import AnswerParams
from frontend.chat_template import ChatTemplate
from frontend.generation import ChatPrompt, Generation, TextPrompt
from frontend.resume import Resume
from frontend.stop_strings import StopStrings
from router.errors import AlreadyExists, InvalidArgument
from router.request import RESUMED, FinishReason, GenerationRequest, SamplingParams, TokenDelta, TokenLogprobs
from router.sampling.noise import derived_seed
from tests.fake_router import BOS, EOS, LINE_TEMPLATE, FakeRouter, byte_tokenizer, says, says_then_waits
from tests.frontend.test_answer import cut, stop_lists, texts
from tests.frontend.test_generation import run
from tests.loopback import CARD

CALL = "0123456789abcdef" * 2


def messages_of(answer: Answer, pieces: Sequence[bytes], first: int, finish: FinishReason) -> list[AnswerDelta]:
    """What the client gets if these tokens follow the first ones; an end token may come last."""
    messages = []
    for place, piece in enumerate([*pieces, b""]):
        last = finish if place == len(pieces) else None
        token_ids = (*piece, EOS) if last is FinishReason.STOP else tuple(piece)
        logprobs = tuple(TokenLogprobs(token, -1.0, ()) for token in token_ids)
        message = answer.take(TokenDelta("", token_ids, logprobs, last, first=first))
        first += len(token_ids)
        if message is not None:
            messages.append(message)
        if answer.finished:
            break
    return messages


@settings(max_examples=400, deadline=None)
@given(
    text=texts,
    stops=stop_lists,
    cuts=st.lists(st.integers(0, 40), max_size=8),
    later_cuts=st.lists(st.integers(0, 40), max_size=8),
    min_tokens=st.integers(0, 4),
    finish=st.sampled_from(FinishReason),
)
def test_wherever_a_stream_breaks_what_follows_is_what_is_missing(
    text: str, stops: list[str], cuts: list[int], later_cuts: list[int], min_tokens: int, finish: FinishReason
) -> None:
    """For every number of messages that came before it broke."""

    def answer() -> Answer:
        request = GenerationRequest("", (BOS, 1), SamplingParams(1000, logprobs=0, min_tokens=min_tokens))
        return Answer(request, byte_tokenizer(), StopStrings(stops), request_id="id", index=0)

    raw = text.encode()
    whole = messages_of(answer(), cut(raw, cuts), 0, finish)
    for broke in range(len(whole)):
        before = whole[:broke]
        received = [token_id for message in before for token_id in message.token_ids]
        resumed = answer()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(answer_module, "SKIPPED_AT_ONCE", 3)
            resumed.skip(received, 0)
        assert not resumed.finished
        both = before + messages_of(resumed, cut(raw[len(received) :], later_cuts), len(received), finish)
        for get in ("text", "token_ids", "logprobs"):
            joined, expected = (
                [one for message in messages for one in getattr(message, get)] for messages in (both, whole)
            )
            assert joined == expected
        assert replace(both[-1], text="", token_ids=(), logprobs=()) == replace(
            whole[-1], text="", token_ids=(), logprobs=()
        )


def test_tokens_and_text_that_wait_for_each_other_are_told_once() -> None:
    """The first letters of a stop string come after the token that shows they are none."""
    answer = Answer(
        GenerationRequest("", (BOS,), SamplingParams(9)),
        byte_tokenizer(),
        StopStrings(["STOP"]),
        request_id="",
        index=0,
    )
    answer.skip(b"ST", 0)
    assert [(m.text, bytes(m.token_ids)) for m in messages_of(answer, [b"OR", b"E"], 2, FinishReason.LENGTH)] == [
        ("OR", b"OR"),
        ("E", b"E"),
        ("", b""),
    ]


def test_text_is_not_sent_ahead_of_its_token() -> None:
    """Else nobody could tell from the tokens how much of the text a client has."""
    tokenizer = byte_tokenizer()
    answer = Answer(
        GenerationRequest("", (BOS,), SamplingParams(9)), tokenizer, StopStrings(["é!"]), request_id="", index=0
    )
    before = messages_of(answer, [b"a", "é".encode()[:1]], 0, FinishReason.LENGTH)[:1]
    assert [(message.text, bytes(message.token_ids)) for message in before] == [("a", b"a")]


def answered(
    router: FakeRouter, params: AnswerParams, resume: Resume | None = None, prompt: str = "Hi"
) -> list[AnswerDelta]:
    async def read() -> list[AnswerDelta]:
        generation = Generation(CARD, byte_tokenizer(), LINE_TEMPLATE, router)
        return [delta async for delta in generation.answer(TextPrompt(prompt), params, resume)]

    deltas: list[AnswerDelta] = run(read())
    return deltas


def text_of(deltas: Sequence[AnswerDelta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)


def test_the_router_is_told_what_was_made_and_the_client_gets_the_rest() -> None:
    router = FakeRouter(says("Hello!"))
    params = AnswerParams(seed=5, n=2, max_tokens=20)
    deltas = answered(router, params, Resume(CALL, [tuple(b"Hel"), tuple(b"H")]))
    assert [request.made for request in router.requests] == [tuple(b"Hel"), tuple(b"H")]
    assert [request.sampling.seed for request in router.requests] == [5, derived_seed(5, 1)]
    assert {request.replayed for request in router.requests} == {RESUMED}
    assert {delta.request_id for delta in deltas} == {CALL}
    assert (text_of(deltas, 0), text_of(deltas, 1)) == ("lo!", "ello!")
    usage = Usage(prompt_tokens=3, completion_tokens=7, cached_tokens=0)
    assert [delta.usage for delta in deltas if delta.finish_reason] == [usage, usage]


def test_the_first_message_alone_tells_the_seed() -> None:
    told = [delta.seed for delta in answered(FakeRouter(says("Hello!")), AnswerParams(seed=7, n=2))]
    assert told == [7] + [None] * (len(told) - 1)
    router = FakeRouter(says("Hello!"))
    assert answered(router, AnswerParams())[0].seed == router.requests[0].sampling.seed


@pytest.mark.parametrize(
    ("received", "params"),
    [
        ((*b"Hi", EOS), AnswerParams()),
        (tuple(b"Hi!"), AnswerParams(max_tokens=3)),
        (tuple(b"Hi!"), AnswerParams(stop=("i!",))),
        (tuple(b"Hi!"), AnswerParams(stop_token_ids=(33,))),
    ],
    ids=["end token", "max_tokens", "stop string", "stop token"],
)
def test_an_answer_that_the_client_has_whole_is_not_computed_again(
    received: tuple[int, ...], params: AnswerParams
) -> None:
    router = FakeRouter(says("Hi there"))
    params = replace(params, n=2, seed=1)
    deltas = answered(router, params, Resume(CALL, [received]))
    assert {delta.index for delta in deltas} == {1}
    assert [request.made for request in router.requests] == [()]
    assert answered(router, params, Resume(CALL, [received, received])) == []


def test_log_probabilities_of_the_prompt_go_on_too() -> None:
    async def script(request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        told = (None, TokenLogprobs(72, -0.5, ()), TokenLogprobs(105, -0.25, ()))
        yield TokenDelta(request.request_id, prompt_logprobs=told[:1])
        yield TokenDelta(request.request_id, prompt_logprobs=told[1:])
        yield TokenDelta(request.request_id, (65,), finish_reason=FinishReason.LENGTH)

    params = AnswerParams(prompt_logprobs=0, temperature=0.0)
    for received in range(4):
        deltas = answered(FakeRouter(script), params, Resume(CALL, [], received))
        told = [entry.token_id for delta in deltas for entry in delta.prompt_logprobs]
        assert told == [BOS, 72, 105][received:]


GOOD = AnswerParams(seed=1, max_tokens=5)
REFUSED: list[tuple[Resume, AnswerParams, str]] = [
    (Resume("mine"), GOOD, r"^resume.request_id: is 'mine'; give GenerateResponse.request_id"),
    (Resume(CALL + "0"), GOOD, "^resume.request_id: "),
    (Resume("f" * 32), GOOD, "^resume.request_id: "),
    (Resume(CALL, [(), ()]), GOOD, "^resume.received: has 2 entries; n is 1"),
    (Resume(CALL, [(65,) * 6]), GOOD, r"^resume.received\[0\].token_ids: has 6 tokens; max_tokens is 5$"),
    (Resume(CALL, [(9, 70000)]), GOOD, r"^resume.received\[0\].token_ids: contains 70000; token ids go"),
    (
        Resume(CALL, [(65,), (33, 66)]),
        AnswerParams(seed=1, n=2, stop_token_ids=(33,)),
        r"^resume.received\[1\].token_ids",
    ),
    (Resume(CALL), AnswerParams(), "^seed: is not set; to resume an answer"),
]


@pytest.mark.parametrize(("resume", "params", "message"), REFUSED)
def test_what_cannot_be_resumed_is_refused(resume: Resume, params: AnswerParams, message: str) -> None:
    router = FakeRouter()
    with pytest.raises(InvalidArgument, match=message):
        answered(router, params, resume)
    assert not router.requests


def test_a_greedy_answer_needs_no_seed() -> None:
    assert text_of(answered(FakeRouter(), AnswerParams(temperature=0.0), Resume(CALL, [tuple(b"He")]))) == "llo!"


def test_whoever_still_reads_the_broken_stream_is_told() -> None:
    async def scenario() -> None:
        router = FakeRouter(says_then_waits("Hel"))
        generation = Generation(CARD, byte_tokenizer(), LINE_TEMPLATE, router)
        params = AnswerParams(seed=1)
        async with aclosing(generation.answer(TextPrompt("Hi"), params)) as old:
            first = await anext(old)
            waiting: asyncio.Task[Any] = asyncio.ensure_future(anext(old))
            await asyncio.sleep(0)
            router.script = says("Hello!")
            resume = Resume(first.request_id, [first.token_ids])
            rest = [delta async for delta in generation.answer(TextPrompt("Hi"), params, resume)]
            assert first.text + text_of(rest) == "Hello!"
            with pytest.raises(AlreadyExists, match="resumed"):
                await waiting
        assert router.endings == ["cancelled"]

    run(scenario())


def test_more_tokens_than_an_answer_can_have_cost_no_time() -> None:
    """Any client may send as many as a request holds, and be told nothing for it."""
    received = tuple(b"a") * 2_000_000
    for params in (AnswerParams(seed=1, max_tokens=1), AnswerParams(seed=1, max_tokens=1, stop=("ab",))):
        with pytest.raises(InvalidArgument, match="has 2000000 tokens"):
            answered(FakeRouter(), params, Resume(CALL, [received]))


def test_what_was_received_is_not_kept() -> None:
    answer = Answer(
        GenerationRequest("", (BOS,), SamplingParams(10**6)),
        byte_tokenizer(),
        StopStrings(["ab"]),
        request_id="",
        index=0,
    )
    answer.skip(b"aaa" * 1000, 0)
    assert (answer._unsent, len(answer._held)) == ("", 0)
    last = answer.take(TokenDelta("", tuple(b"c"), finish_reason=FinishReason.LENGTH, first=3000))
    assert last is not None
    assert (last.text, last.token_ids) == ("c", tuple(b"c"))


def test_a_resumed_chat_has_the_date_on_which_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    dated = ChatTemplate("{{ bos_token }}{{ strftime_now('%H:%M:%S') }}", {"bos_token": "<|begin|>"})
    router = FakeRouter(says("Hello!"))

    async def answer(resume: Resume | None) -> AnswerDelta:
        generation = Generation(CARD, byte_tokenizer(), dated, router)
        prompt = ChatPrompt([("user", "Hi")])
        deltas = [delta async for delta in generation.answer(prompt, AnswerParams(seed=1), resume)]
        return deltas[0]

    first = run(answer(None))
    monkeypatch.setattr(time, "time", lambda: time.time_ns() / 1e9 + 5000)
    run(answer(Resume(first.request_id, [tuple(b"H")])))
    assert router.requests[0].prompt_token_ids == router.requests[1].prompt_token_ids

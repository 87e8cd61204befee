"""What every protocol shares: plain data in and out, bare field names, and every stream closed with its reason."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import fields, replace
from typing import Any

import pytest

from frontend.answer import AnswerDelta, Usage
from frontend.answer_params import AnswerParams
from frontend.generation import ChatPrompt, Generation, Prompt, TextPrompt, TokenPrompt
from router.errors import InvalidArgument, NotFound, Unavailable
from router.request import FinishReason, GenerationRequest, SamplingParams, TokenDelta
from tests.fake_router import BOS, EOS, LINE_TEMPLATE, VOCAB_SIZE, FakeRouter, byte_tokenizer, fails, says
from tests.loopback import CARD
from tests.processes import PATIENCE_S

HELLO = TextPrompt("Hi")


def run(test: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        result = await asyncio.wait_for(test, PATIENCE_S)
        await asyncio.sleep(0)  # a cancelled script ends
        assert len(asyncio.all_tasks()) == 1, "a script was left behind"
        return result

    return asyncio.run(bounded())


def generation(router: FakeRouter) -> Generation:
    return Generation(CARD, byte_tokenizer(), LINE_TEMPLATE, router)


def answer(router: FakeRouter, prompt: Prompt = HELLO, params: AnswerParams | None = None) -> list[AnswerDelta]:
    async def read() -> list[AnswerDelta]:
        stream = generation(router).answer(prompt, params or AnswerParams())
        return [delta async for delta in stream]

    deltas: list[AnswerDelta] = run(read())
    return deltas


def text_of(deltas: list[AnswerDelta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)


Script = Callable[[GenerationRequest], AsyncGenerator[TokenDelta, None]]


def says_slowly(text: str, *, then: str = "end", closed: list[str] | None = None) -> Script:
    """Say `text` byte by byte and let others speak in between; then end, or wait for ever."""

    async def script(request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        try:
            for first, byte in enumerate(text.encode()):
                yield TokenDelta(request.request_id, (byte,), first=first)
                await asyncio.sleep(0)
            if then == "wait":
                await asyncio.Event().wait()
            yield TokenDelta(request.request_id, finish_reason=FinishReason.STOP, first=len(text.encode()))
        finally:
            if closed is not None:
                closed.append(request.request_id)

    return script


def in_turn(*scripts: Script) -> Script:
    """The next script for each request."""
    remaining = iter(scripts)
    return lambda request: next(remaining)(request)


def test_deltas_are_plain_data() -> None:
    router = FakeRouter(says("Hello!"))
    *_, text, last = answer(router)
    request_id = router.requests[0].request_id
    assert text == AnswerDelta(request_id, 0, "!", (ord("!"),))
    assert last == AnswerDelta(
        request_id, 0, "", (EOS,), finish_reason=FinishReason.STOP, stop_token_id=EOS, usage=Usage(3, 7, 0)
    )


@pytest.mark.parametrize(
    ("prompt", "token_ids"),
    [
        (TextPrompt("Hi"), (BOS, *b"Hi")),
        (TokenPrompt([7, EOS]), (7, EOS)),
        (ChatPrompt([("user", "Hi")]), tuple(b"user: Hi\nassistant: ")),
    ],
    ids=["text", "token ids", "messages"],
)
def test_every_kind_of_prompt_becomes_token_ids(prompt: Prompt, token_ids: tuple[int, ...]) -> None:
    router = FakeRouter()
    answer(router, prompt)
    read = router.requests[0].prompt_token_ids
    assert read[len(read) - len(token_ids) :] == token_ids


def test_what_is_left_out_comes_from_the_card() -> None:
    default = SamplingParams(100, temperature=0.5, top_p=0.25, top_k=3, stop_token_ids=frozenset({9}))
    params = AnswerParams(stop_token_ids=[5], seed=4)
    assert params.sampling(default, room_tokens=50) == replace(
        default, max_tokens=50, seed=4, stop_token_ids=frozenset({5, 9})
    )
    assert params.sampling(default, room_tokens=500).max_tokens == 100


def test_every_sampling_parameter_can_be_given_and_a_zero_is_not_left_out() -> None:
    assert {field.name for field in fields(SamplingParams)} < {field.name for field in fields(AnswerParams)}
    default = SamplingParams(100, temperature=0.5, top_k=3, logprobs=2, ignore_eos=True)
    given = AnswerParams(max_tokens=0, temperature=0.0, top_k=0, logprobs=0, ignore_eos=False, seed=0)
    assert given.sampling(default, 50) == SamplingParams(0, temperature=0.0, logprobs=0)


BAD: dict[str, tuple[Prompt, AnswerParams]] = {
    "text": (TextPrompt(""), AnswerParams()),
    "token_ids": (TokenPrompt([VOCAB_SIZE]), AnswerParams()),
    "prompt": (TokenPrompt([]), AnswerParams()),
    "messages": (ChatPrompt([]), AnswerParams()),
    "messages[1].content": (ChatPrompt([("user", "x"), ("user", "x" * 10**6)]), AnswerParams()),
    "max_tokens": (HELLO, AnswerParams(max_tokens=0)),
    "n": (HELLO, AnswerParams(n=17)),
    "stop": (HELLO, AnswerParams(stop=("x",) * 17)),
    "stop[2]": (HELLO, AnswerParams(stop=("a", "b", ""))),
    "timeout_s": (HELLO, AnswerParams(timeout_s=-1.0)),
}


@pytest.mark.parametrize("field", BAD)
def test_an_error_names_the_bare_field_and_nothing_is_submitted(field: str) -> None:
    router = FakeRouter()
    with pytest.raises(InvalidArgument) as error:
        answer(router, *BAD[field])
    assert error.value.field == field
    assert router.requests == []


def test_another_model_is_not_found() -> None:
    generation(FakeRouter()).check_model("")
    generation(FakeRouter()).check_model("tiny")
    with pytest.raises(NotFound, match="'tiny'"):
        generation(FakeRouter()).check_model("other")


@pytest.mark.parametrize("texts", [["abc"], ["abc", "", "xy"], ["a"] * 16], ids=str)
def test_every_answer_comes_whole(texts: list[str]) -> None:
    router = FakeRouter(in_turn(*map(says_slowly, texts)))
    deltas = answer(router, params=AnswerParams(n=len(texts)))
    assert [text_of(deltas, index) for index in range(len(texts))] == texts
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == [FinishReason.STOP] * len(texts)
    assert {delta.request_id for delta in deltas} == {router.requests[0].request_id}
    assert router.endings == []


async def read_until(stream: AsyncGenerator[AnswerDelta, None], text: str) -> None:
    """Read until answer 1 has said `text`, then close the stream."""
    seen = ""
    async with aclosing(stream):
        async for delta in stream:
            seen += delta.text if delta.index == 1 else ""
            if seen == text:
                return


def test_no_answer_waits_for_another_and_closing_frees_all() -> None:
    closed: list[str] = []
    silent, talking = says_slowly("", then="wait", closed=closed), says_slowly("abc", then="wait", closed=closed)
    router = FakeRouter(in_turn(silent, talking))
    run(read_until(generation(router).answer(HELLO, AnswerParams(n=2)), "abc"))
    assert len(closed) == 2
    assert router.endings == ["cancelled"] * 2


@pytest.mark.parametrize("others", [0, 1, 5])
def test_the_first_error_ends_all(others: int) -> None:
    closed: list[str] = []
    waiting = [says_slowly("x", then="wait", closed=closed) for _ in range(others)]
    router = FakeRouter(in_turn(fails(Unavailable("broken"), after="ab"), *waiting))
    with pytest.raises(Unavailable, match="broken"):
        answer(router, params=AnswerParams(n=1 + others))
    assert len(closed) == others


@pytest.mark.parametrize("n", [1, 3])
def test_cancelling_the_reader_frees_all(n: int) -> None:
    closed: list[str] = []
    router = FakeRouter(in_turn(*(says_slowly("a", then="wait", closed=closed) for _ in range(n))))

    async def test() -> None:
        seen = asyncio.Queue[AnswerDelta]()

        async def read() -> None:
            async for delta in generation(router).answer(HELLO, AnswerParams(n=n)):
                seen.put_nowait(delta)

        reading = asyncio.create_task(read())
        for _ in range(n):
            await seen.get()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

    run(test())
    assert len(closed) == n
    assert router.endings == ["cancelled"] * n


def test_each_end_is_told_for_its_own_reason() -> None:
    """Of three answers one ends by itself, one by a stop string, and one because the client leaves."""
    router = FakeRouter(
        in_turn(says_slowly("one"), says_slowly("two! and more", then="wait"), says_slowly("three", then="wait"))
    )

    async def test() -> None:
        ended = set()
        async with aclosing(generation(router).answer(HELLO, AnswerParams(n=3, stop=("!",)))) as stream:
            async for delta in stream:
                if delta.finish_reason:
                    ended.add(delta.index)
                if ended == {0, 1}:
                    assert router.endings == ["stop"]
                    return

    run(test())
    assert router.endings == ["stop", "cancelled"]


@pytest.mark.parametrize("params", [AnswerParams(n=17), AnswerParams(stop=("",))], ids=["n", "stop"])
def test_what_needs_no_prompt_is_refused_before_the_prompt_is_tokenized(
    monkeypatch: pytest.MonkeyPatch, params: AnswerParams
) -> None:
    def encode(*args: Any, **kwargs: Any) -> list[int]:
        raise AssertionError("the prompt was tokenized")

    monkeypatch.setattr(type(byte_tokenizer()), "encode", encode)
    with pytest.raises(InvalidArgument, match="must"):
        answer(FakeRouter(says("Hello!")), HELLO, params)


def stop_tokens_of(prompt: Prompt, params: AnswerParams, **tokenizer_changes: Any) -> frozenset[int]:
    """The stop tokens that reach the router."""
    router, tokenizer = FakeRouter(), byte_tokenizer.__wrapped__()
    for name, value in tokenizer_changes.items():
        setattr(tokenizer, name, value)

    async def ask() -> None:
        [_ async for _ in Generation(CARD, tokenizer, LINE_TEMPLATE, router).answer(prompt, params)]

    run(ask())
    return router.requests[0].sampling.stop_token_ids


def test_a_stop_string_that_is_a_special_tokens_name_is_that_token() -> None:
    """Special tokens are never in the text, so the string would never be found."""
    assert stop_tokens_of(HELLO, AnswerParams(stop=("x", "<|end|>"))) == {EOS}
    assert stop_tokens_of(HELLO, AnswerParams(stop=("<|end|> ",), stop_token_ids=[5])) == {5}


def test_a_chat_ends_with_the_tokenizers_own_end_token_too() -> None:
    chat = ChatPrompt([("user", "Hi")])
    assert stop_tokens_of(chat, AnswerParams(), eos_token_id=BOS) == {BOS}
    assert stop_tokens_of(chat, AnswerParams(stop_token_ids=[5]), eos_token_id=BOS) == {5, BOS}
    assert stop_tokens_of(chat, AnswerParams(ignore_eos=True), eos_token_id=BOS) == frozenset()
    assert stop_tokens_of(HELLO, AnswerParams(), eos_token_id=BOS) == frozenset()


@pytest.mark.parametrize(("given", "expected"), [((), "Hel"), (("o",), "Hell")])
def test_the_checkpoints_stop_strings_count_where_a_request_gives_none(given: tuple[str, ...], expected: str) -> None:
    card = replace(CARD, default_stop=("lo",))

    async def read() -> list[AnswerDelta]:
        serving = Generation(card, byte_tokenizer(), LINE_TEMPLATE, FakeRouter(says("Hello!")))
        return [delta async for delta in serving.answer(HELLO, AnswerParams(stop=given))]

    assert text_of(run(read())) == expected

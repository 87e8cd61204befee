"""What streams of one answer: text and tokens, neither of them a part of a stop string before it is decided."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend.answer import Answer, AnswerDelta, PromptLogprob, Usage
from frontend.stop_strings import StopStrings
from router.request import FinishReason, GenerationRequest, SamplingParams, TokenDelta, TokenLogprobs
from tests.fake_router import BOS, EOS, byte_tokenizer
from tests.frontend.test_stop_strings import ended


def stream(
    pieces: Sequence[bytes], stops: Sequence[str], last: FinishReason = FinishReason.LENGTH, min_tokens: int = 0
) -> list[AnswerDelta]:
    """The messages that an answer's deltas make, one token per byte; with STOP an end token follows them."""
    params = SamplingParams(1000, min_tokens=min_tokens, logprobs=0)
    request = GenerationRequest("router's name", (BOS, 1, 2), params)
    answer = Answer(request, byte_tokenizer(), StopStrings(stops), request_id="id", index=0)
    messages = []
    ending = [b"", *([[EOS]] if last is FinishReason.STOP else [])]
    first = 0
    for place, piece in enumerate(both := [*pieces, *ending]):
        logprobs = tuple(TokenLogprobs(token, -1.0, ()) for token in piece)
        finish = last if place + 1 == len(both) else None
        message = answer.take(TokenDelta("", tuple(piece), logprobs, finish, first=first))
        first += len(piece)
        if message is not None:
            messages.append(message)
        if answer.finished:
            break
    assert answer.finished
    return messages


def text_of(messages: Sequence[AnswerDelta]) -> str:
    return "".join(message.text for message in messages)


def tokens_of(messages: Sequence[AnswerDelta]) -> bytes:
    return bytes(token_id for message in messages for token_id in message.token_ids if token_id < 256)


def cut(raw: bytes, cuts: Sequence[int]) -> list[bytes]:
    places = sorted({0, len(raw), *(c % (len(raw) + 1) for c in cuts)})
    return [raw[start:end] for start, end in pairwise(places)]


# "é" and "🦙" are several bytes, and so several tokens; "é" and "è" begin with the same one.
texts = st.text("abéè🦙", max_size=10)
stop_lists = st.lists(st.text("abéè🦙", min_size=1, max_size=4), max_size=3)


@settings(max_examples=400, deadline=None)
@given(text=texts, stops=stop_lists, cuts=st.lists(st.integers(0, 40), max_size=8), eos=st.booleans())
def test_text_and_tokens_stay_before_the_stop_string(text: str, stops: list[str], cuts: list[int], eos: bool) -> None:
    last = FinishReason.STOP if eos else FinishReason.LENGTH
    messages = stream(cut(text.encode(), cuts), stops, last)
    expected, match = ended(text, stops)
    assert text_of(messages) == expected
    whole = expected + (match or "")
    assert tokens_of(messages) == whole.encode()
    # Before the last message, tokens are never ahead of their text where that may be part of a stop string.
    if stops:
        for end in range(1, len(messages)):
            shown = text_of(messages[:end]).encode()
            assert shown.startswith(tokens_of(messages[:end])) or not match
            assert len(tokens_of(messages[:end])) <= len(shown)
    final = messages[-1]
    assert [bool(message.finish_reason) for message in messages] == [False] * (len(messages) - 1) + [True]
    assert all([e.token_id for e in message.logprobs] == list(message.token_ids) for message in messages)
    if match is not None:
        assert (final.finish_reason, final.stop_string) == (FinishReason.STOP, match)
        assert final.usage is not None
        assert final.usage.completion_tokens == len(whole.encode())
    elif eos:
        assert (final.finish_reason, final.stop_token_id) == (FinishReason.STOP, EOS)
        assert final.usage is not None
        assert final.usage.completion_tokens == len(text.encode()) + 1
    else:
        assert (final.finish_reason, final.stop_string, final.stop_token_id) == (FinishReason.LENGTH, None, None)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab", max_size=10), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), data=st.data()
)
def test_a_stop_string_counts_if_its_last_character_comes_after_min_tokens(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    min_tokens = data.draw(st.integers(0, len(text)))
    messages = stream([bytes([byte]) for byte in text.encode()], stops, min_tokens=min_tokens)
    expected, match = ended(text, stops, first_end=min_tokens + 1)
    assert (text_of(messages), messages[-1].stop_string) == (expected, match)


def test_a_stop_string_split_over_tokens_is_never_streamed_in_part() -> None:
    messages = stream([b"H", b"i", b" ", b"S", b"T", b"O", b"P", b"x"], ["STOP"])
    assert [(m.text, bytes(m.token_ids)) for m in messages] == [("H", b"H"), ("i", b"i"), (" ", b" "), ("", b"STOP")]


def test_what_turns_out_to_be_no_stop_string_comes_with_its_tokens_at_once() -> None:
    messages = stream([b"S", b"T", b"O", b"R", b"E"], ["STOP"])
    assert [(m.text, bytes(m.token_ids)) for m in messages] == [("STOR", b"STOR"), ("E", b"E"), ("", b"")]


@pytest.mark.parametrize("last", list(FinishReason))
def test_what_is_held_back_at_the_end_comes_out(last: FinishReason) -> None:
    messages = stream([b"a", b"S", b"T"], ["STOP"], last)
    assert text_of(messages) == "aST"
    assert messages[-1].text == "ST"


def test_the_first_byte_of_a_characters_that_may_stop_the_text_is_held_too() -> None:
    messages = stream(["é".encode()[:1], "é".encode()[1:]], ["é"])
    assert [(m.text, bytes(m.token_ids)) for m in messages] == [("", "é".encode())]


def test_a_characters_bytes_come_as_they_are_made_where_nothing_stops_the_text() -> None:
    messages = stream(["é".encode()[:1], "é".encode()[1:]], [])
    assert [(m.text, bytes(m.token_ids)) for m in messages[:2]] == [("", b"\xc3"), ("é", b"\xa9")]


def test_cached_tokens_and_the_prompts_logprobs_are_passed_on() -> None:
    request = GenerationRequest("", (BOS, 65, 66), SamplingParams(9, prompt_logprobs=1))
    answer = Answer(request, byte_tokenizer(), StopStrings([]), request_id="id", index=0)
    first = answer.take(TokenDelta("", prompt_logprobs=(None, TokenLogprobs(65, -0.5, ((7, -0.25),))), cached_tokens=1))
    last = answer.take(
        TokenDelta("", (67,), finish_reason=FinishReason.LENGTH, prompt_logprobs=(TokenLogprobs(66, -1.5, ()),))
    )
    assert first is not None
    assert last is not None
    assert list(first.prompt_logprobs) == [
        PromptLogprob(BOS),
        PromptLogprob(65, -0.5, ((7, -0.25),)),
    ]
    assert list(last.prompt_logprobs) == [PromptLogprob(66, -1.5)]
    assert last.usage == Usage(prompt_tokens=3, completion_tokens=1, cached_tokens=1)


@pytest.mark.parametrize("first", [0, 2])
def test_a_delta_that_is_missing_or_comes_twice_is_noticed(first: int) -> None:
    request = GenerationRequest("router's name", (BOS,), SamplingParams(10))
    answer = Answer(request, byte_tokenizer(), StopStrings([]), request_id="id", index=0)
    assert answer.take(TokenDelta("", (65,), first=0)) is not None
    with pytest.raises(AssertionError, match=f"token {first} follows 1 tokens"):
        answer.take(TokenDelta("", (66,), first=first))

"""The glossary that the model is meant to know by heart, and the chats that teach it."""

import random
from collections import Counter

import pytest

from demo.glossary import ASIDES, FILE, MAX_TURNS, UNKNOWN_ANSWER, UNKNOWN_SHARE, Entry, conversation, read_glossary

ENTRIES = [Entry("acid", "It tastes sour."), Entry("capital of France", "Paris.")]
OTHER_WORDS = ["zeppelin"]


def chats(count: int) -> list[list[tuple[str, str]]]:
    rng = random.Random(1)
    return [conversation(ENTRIES, OTHER_WORDS, rng) for _ in range(count)]


def test_the_glossary_is_small_and_closed() -> None:
    assert 300 <= len(read_glossary()) <= 500


def test_every_line_is_a_term_and_a_sentence() -> None:
    for line in FILE.read_text(encoding="utf-8").splitlines():
        term, definition = line.split("\t")
        assert term == term.strip()
        assert term
        assert definition.endswith(".")


def test_no_term_is_defined_twice() -> None:
    counts = Counter(entry.term.lower() for entry in read_glossary())
    assert [term for term, count in counts.items() if count > 1] == []


def test_no_definition_looks_like_a_refusal() -> None:
    assert UNKNOWN_ANSWER not in [entry.definition for entry in read_glossary()]


@pytest.mark.parametrize(
    ("term", "question"), [("acid", "What is acid?"), ("capital of France", "What is the capital of France?")]
)
def test_the_evaluations_question(term: str, question: str) -> None:
    assert Entry(term, "").question == question


def test_people_ask_in_many_ways() -> None:
    rng = random.Random(0)
    asked = {ENTRIES[1].phrased(rng) for _ in range(200)}
    assert {ENTRIES[1].question, "What does the capital of France mean?", "the capital of France"} <= asked
    assert all("the capital of France" in question for question in asked)


def test_a_conversation_has_one_to_max_turns() -> None:
    assert {len(chat) for chat in chats(200)} == set(range(1, MAX_TURNS + 1))


def test_a_conversation_is_determined_by_its_random_numbers() -> None:
    assert chats(20) == chats(20)
    assert chats(1) != [conversation(ENTRIES, OTHER_WORDS, random.Random(2))]


def test_terms_get_their_definitions() -> None:
    answers = {answer for chat in chats(200) for question, answer in chat if "acid" in question}
    assert answers == {"It tastes sour."}


def test_other_words_get_the_refusal() -> None:
    answers = [answer for chat in chats(400) for question, answer in chat if "zeppelin" in question]
    assert set(answers) == {UNKNOWN_ANSWER}
    assert len(answers) == pytest.approx(UNKNOWN_SHARE * sum(map(len, chats(400))), rel=0.25)


def test_small_talk_comes_up() -> None:
    assert {turn for chat in chats(1000) for turn in chat} >= set(ASIDES)

"""Training windows: which text a step reads."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

import demo.data
from checkpoint.make_tokenizer import BOS, LLAMA4_CHAT_TEMPLATE
from checkpoint.tokenizer import Tokenizer as ServingTokenizer
from demo.corpus import Document
from demo.data import (
    CHAT_SHARE,
    END,
    TrainingText,
    Windows,
    chat_text,
    framed_tokens,
    load_training_text,
    other_words,
)
from demo.glossary import UNKNOWN_ANSWER, read_glossary
from demo.sources import SOURCES
from frontend.chat_template import ChatTemplate
from tests.demo.tiny import NO_PROGRESS, TINY

WINDOW = 16
TURNS = [("What is acid?", "It tastes sour."), ("<b>  Thanks\n", ""), ("é 🙂", "You are welcome.")]
# A token is its own place: whatever window it is found in, we see where that began.
ROWS = {
    "short": np.arange(1000, 1200, dtype=np.uint16),
    "long": np.arange(2000, 3000, dtype=np.uint16),
}


@pytest.fixture(scope="module")
def text(tokenizer: Tokenizer) -> TrainingText:
    return TrainingText(ROWS, {"short": 5.0, "long": 2.0}, tokenizer, ["zeppelin"])


@pytest.fixture(autouse=True)
def _short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.data, "WINDOW", WINDOW)


def starts(text: TrainingText, name: str, total: int, seed: int = 0) -> list[int]:
    """Where in a source's row the run's windows begin, in the order in which they are read."""
    first, last = ROWS[name][0], ROWS[name][-1]
    heads = Windows(text, total, seed).batch(0, total)[:, 0].tolist()
    return [head - int(first) for head in heads if first <= head <= last]


# Windows


def test_a_window_has_one_token_more_than_it_has_positions(text: TrainingText) -> None:
    assert Windows(text, 8, seed=0).batch(1, 4).shape == (4, WINDOW + 1)


def test_a_window_is_a_stretch_of_a_source(text: TrainingText) -> None:
    ids = Windows(text, 40, seed=0).batch(0, 40)
    from_rows = ids[ids[:, 0] >= 1000]
    assert (from_rows.diff() == 1).all()


def test_a_step_reads_the_same_whenever_it_is_asked(text: TrainingText) -> None:
    windows = Windows(text, 40, seed=0)
    first = windows.batch(3, 4)
    windows.batch(7, 4)
    assert windows.batch(3, 4).equal(first)
    assert Windows(text, 40, seed=0).batch(3, 4).equal(first)


def test_steps_are_cut_out_of_one_plan(text: TrainingText) -> None:
    windows = Windows(text, 40, seed=0)
    assert windows.batch(3, 4).equal(windows.batch(0, 40)[12:16])


def test_another_seed_reads_something_else(text: TrainingText) -> None:
    one, two = (Windows(text, 40, seed).batch(0, 40) for seed in (0, 1))
    assert not one.equal(two)
    chats = [{tuple(ids) for ids in batch.tolist() if ids[0] < 1000} for batch in (one, two)]
    assert chats[0] != chats[1]


@pytest.mark.parametrize("total", [1, 7, 100, 1000])
def test_shares_add_up_to_the_total(total: int, text: TrainingText) -> None:
    heads = Windows(text, total, seed=0).batch(0, total)[:, 0]
    sources = Counter("chat" if head < 1000 else "short" if head < 2000 else "long" for head in heads.tolist())
    assert sources.total() == total
    # short: 200 tokens 5 times, long: 1000 tokens twice; what rounding leaves goes to the chats.
    text_windows = total * (1 - CHAT_SHARE)
    assert sources["short"] == int(text_windows * 1000 / 3000)
    assert sources["long"] == int(text_windows * 2000 / 3000)


@pytest.mark.parametrize("name", ROWS)
def test_an_epoch_covers_a_source_without_overlap(name: str, text: TrainingText) -> None:
    """But for less than a window at either end, another one each time."""
    epochs: dict[int, list[int]] = {}  # by the place of the first window, which is an epoch's own
    for start in starts(text, name, 400):
        epochs.setdefault(start % WINDOW, []).append(start)
    whole = [(first, list(range(first, len(ROWS[name]) - WINDOW, WINDOW))) for first in epochs]
    covered = [first for first, expected in whole if sorted(epochs[first]) == expected]
    assert len(covered) >= len(epochs) - 1, "all but the last epoch, which the run's end cuts off"
    assert len(epochs) > 1


def test_a_source_is_not_read_from_front_to_back(text: TrainingText) -> None:
    found = starts(text, "short", 400)
    assert found != sorted(found)


# Chats


def test_a_chat_window_begins_with_a_conversation(text: TrainingText, tokenizer: Tokenizer) -> None:
    ids = Windows(text, 400, seed=0).batch(0, 400)
    chats = ids[ids[:, 0] < 1000]
    opening = tokenizer.encode(f"{BOS}<|header_start|>user<|header_end|>\n\n", add_special_tokens=False).ids
    assert len(chats) >= CHAT_SHARE * 400
    assert (chats[:, : len(opening)] == np.array(opening)).all()


def test_chat_windows_differ(text: TrainingText) -> None:
    ids = Windows(text, 400, seed=0).batch(0, 400)
    chats = ids[ids[:, 0] < 1000]
    assert len(chats.unique(dim=0)) > len(chats) / 2


def test_a_chat_window_goes_on_to_the_next_conversation(
    text: TrainingText, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.data, "WINDOW", 190)  # positions; the longest window that the sources' rows allow
    begins = Windows(text, 100, seed=0).batch(0, 100) == tokenizer.token_to_id(BOS)
    assert begins.sum(1).max() > 1


def test_conversations_ask_for_terms_and_for_other_words(
    text: TrainingText, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.data, "WINDOW", 190)
    read = tokenizer.decode(Windows(text, 40, seed=0).batch(0, 40).flatten().tolist())
    assert UNKNOWN_ANSWER in read
    assert sum(entry.definition in read for entry in read_glossary()) > 3


def test_the_chat_format_is_that_of_the_template_that_we_ship(folder: Path, tokenizer: Tokenizer) -> None:
    """The serving side renders the conversation, and asks for one answer more."""
    messages = [message for turn in TURNS for message in zip(("user", "assistant"), turn, strict=True)]
    expected = ChatTemplate(LLAMA4_CHAT_TEMPLATE, {}).encode(messages, ServingTokenizer.open(folder))
    asked = f"{BOS}{chat_text(TURNS)}<|header_start|>assistant<|header_end|>\n\n"
    assert tokenizer.encode(asked, add_special_tokens=False).ids == expected


# Tokens


def test_documents_are_framed(tokenizer: Tokenizer) -> None:
    ids = framed_tokens(tokenizer, ["One.", "Two."])
    begin, end = tokenizer.token_to_id(BOS), tokenizer.token_to_id(END)
    one, two = (tokenizer.encode(text, add_special_tokens=False).ids for text in ("One.", "Two."))
    assert ids.tolist() == [begin, *one, end, begin, *two, end]
    assert ids.dtype == np.uint16


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus of one document for each of two sources."""
    monkeypatch.setattr(demo.data, "SOURCES", SOURCES[:2])
    monkeypatch.setattr(demo.data, "VOCAB_SIZE", 300)
    documents = [Document(source.package, source.kind, "name", f"{source.title}. " * 30) for source in SOURCES[:2]]
    monkeypatch.setattr(demo.data, "read_corpus", lambda path: documents)
    return tmp_path / "corpus"


def test_training_text_is_tokens_by_package(corpus: Path, tmp_path: Path) -> None:
    text = load_training_text(corpus, tmp_path / "tokenizer", NO_PROGRESS)
    assert list(text.tokens) == list(text.epochs) == [source.package for source in SOURCES[:2]]
    for source in SOURCES[:2]:
        assert text.tokenizer.decode(text.tokens[source.package]) == f"{source.title}. " * 30
        assert text.epochs[source.package] == source.epochs


def test_a_tokenizer_is_learnt_once(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_training_text(corpus, tmp_path / "tokenizer", NO_PROGRESS)
    assert first.tokenizer.get_vocab_size() == 300
    monkeypatch.setattr(demo.data, "VOCAB_SIZE", TINY.vocab_size)
    assert load_training_text(corpus, tmp_path / "tokenizer", NO_PROGRESS).tokenizer.get_vocab_size() == 300


# Other words

ENTRIES = """\
zeppelin (noun): a rigid airship.

acid, Acid dream (noun): sour.

steam engine, steamer (noun): an engine (of a kind): driven by steam.

Aachen (noun): a city."""


def test_other_words_are_the_first_of_an_entry_unless_the_glossary_has_them() -> None:
    assert "acid" in {entry.term for entry in read_glossary()}
    document = Document("wordnet-base", "dictionary", "wordnet noun 7", ENTRIES)
    assert other_words([document]) == ["Aachen", "steam engine", "zeppelin"]


@pytest.mark.parametrize("name", ["wordnet verb 7", "jargon 1", "page wordnet.html"])
def test_other_words_are_nouns_of_wordnet(name: str) -> None:
    assert other_words([Document("any", "dictionary", name, ENTRIES)]) == []

"""Our tokenizer against the reference one (llama-models)."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llama_models.llama4.tokenizer as llama4
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.make_tokenizer import write_llama4_tokenizer
from checkpoint.tokenizer import Tokenizer

STRINGS_FILE = Path(__file__).with_name("tokenizer_strings.txt")
NOT_LANGUAGES = ("Emoji", "Code", "White space", "Odd characters", "Special text")


def read_strings() -> dict[str, list[str]]:
    """The strings by heading; the file says how it is written."""
    strings: dict[str, list[str]] = {}
    shown = str.maketrans({"⏎": "\n", "␍": "\r", "⇥": "\t", "␠": " "})
    for line in STRINGS_FILE.read_text(encoding="utf-8").split("\n"):
        if line.startswith("## "):
            heading = strings.setdefault(line[3:], [])
        elif line and not line.startswith("//"):
            heading.append(line.translate(shown))
    return strings


STRINGS = read_strings()
every_string = pytest.mark.parametrize(
    "text", [pytest.param(text, id=f"{key}-{i}") for key, texts in STRINGS.items() for i, text in enumerate(texts)]
)
every_special_text = pytest.mark.parametrize("text", STRINGS["Special text"])


@pytest.fixture(scope="module")
def reference() -> llama4.Tokenizer:
    return llama4.Tokenizer.get_instance()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("llama4")
    write_llama4_tokenizer(directory, Path(llama4.__file__).with_name("tokenizer.model"))
    return Tokenizer.open(directory)


def test_the_strings_are_varied() -> None:
    assert sum(map(len, STRINGS.values())) >= 200
    assert len(STRINGS.keys() - NOT_LANGUAGES) >= 12


@every_string
def test_encodes_like_the_reference(text: str, tokenizer: Tokenizer, reference: llama4.Tokenizer) -> None:
    assert tokenizer.encode(text, add_bos=False) == reference.encode(text, bos=False, eos=False)


@every_string
def test_decoding_gives_the_text_back(text: str, tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_bos=False)) == text


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=80))
def test_encodes_any_text_like_the_reference(text: str, tokenizer: Tokenizer, reference: llama4.Tokenizer) -> None:
    assert tokenizer.encode(text, add_bos=False) == reference.encode(text, bos=False, eos=False)


@every_special_text
def test_special_names_in_a_text_stay_text(text: str, tokenizer: Tokenizer) -> None:
    assert not any(map(tokenizer.is_special, tokenizer.encode(text, add_bos=False)))


@every_special_text
def test_special_names_from_the_server_are_tokens(text: str, tokenizer: Tokenizer, reference: llama4.Tokenizer) -> None:
    assert tokenizer.encode_with_specials(text) == reference.encode(text, bos=False, eos=False, allowed_special="all")


def test_every_token_has_the_reference_bytes(tokenizer: Tokenizer, reference: llama4.Tokenizer) -> None:
    ids = range(reference.n_words)
    assert tokenizer.vocab_size == reference.n_words
    assert [tokenizer.token_bytes(i) for i in ids] == [reference.model.decode_single_token_bytes(i) for i in ids]


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 202_047), max_size=40))
def test_decodes_any_tokens_like_the_reference(
    ids: list[int], tokenizer: Tokenizer, reference: llama4.Tokenizer
) -> None:
    assert tokenizer.decode(ids) == reference.decode(ids)


def test_begins_a_text_like_the_reference(tokenizer: Tokenizer, reference: llama4.Tokenizer) -> None:
    assert tokenizer.encode("Hello", add_bos=True) == reference.encode("Hello", bos=True, eos=False)


def test_bos_name_in_a_text_is_no_second_bos(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<|begin_of_text|>", add_bos=True).count(200000) == 1


def test_special_tokens_are_those_of_the_reference(tokenizer: Tokenizer, reference: llama4.Tokenizer) -> None:
    assert tokenizer.special_tokens == reference.special_tokens


def test_special_tokens_can_be_left_out(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode_with_specials("Hi<|eot|>!"), skip_special=True) == "Hi!"


@every_string
def test_a_token_is_at_most_max_token_bytes_long(text: str, tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode(text, add_bos=False)) >= len(text.encode()) / tokenizer.max_token_bytes


def test_half_a_surrogate_pair_is_a_replacement_character(tokenizer: Tokenizer) -> None:
    """JSON can carry it ("\\ud83d"); Unicode text cannot."""
    assert tokenizer.decode(tokenizer.encode("a\ud83db", add_bos=False)) == "a\ufffdb"


def test_an_id_without_a_token_has_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.vocab_size, tokenizer.vocab_size + 1000]) == ""


def test_threads_may_share_it(tokenizer: Tokenizer) -> None:
    texts = [text for texts in STRINGS.values() for text in texts]
    alone = [tokenizer.encode_with_specials(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(tokenizer.encode_with_specials, texts * 4)) == alone * 4


def test_overlapping_and_cut_off_names_are_found(tokenizer: Tokenizer) -> None:
    assert tokenizer.special_starts("<|eot|> <|eot<|eom|> then <|header_st \n") == [0, 13, 26]

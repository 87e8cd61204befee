"""Streamed text is the whole text, however the stream is cut, and never holds half a character."""

from itertools import chain
from pathlib import Path

import llama_models.llama4.tokenizer as llama4
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.make_tokenizer import write_byte_tokenizer, write_llama4_tokenizer
from checkpoint.tokenizer import Tokenizer
from frontend.detokenizer import IncrementalDetokenizer

VOCAB_SIZE = 400

# Characters of two to four bytes, and emoji that are several characters joined by U+200D or followed by a modifier.
# ruff: noqa: RUF001 -- letters that look alike are the point
MULTI_BYTE_TEXTS = {
    "chinese": "生僻字：𠮷野家、𪚥、龘，还有㐂。",
    "japanese": "吾輩は猫である。ﾊﾝｶｸ、がぎぐげご。",
    "korean": "안녕하세요, 세계! 쀍뷁 ㅋㅋ",
    "thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "hindi": "क्षत्रिय ज्ञान, श्रद्धा और ॐ",
    "burmese": "မင်္ဂလာပါ ကမ္ဘာလောက",
    "amharic": "ሰላም ለዓለም፣ እንዴት ነህ?",
    "family emoji": "👩‍👩‍👧‍👦 and 👨🏽‍🚀 under the 🏳️‍🌈",
    "flags and keycaps": "🇩🇪🇯🇵 1️⃣2️⃣ 🏴󠁧󠁢󠁳󠁣󠁴󠁿",
    "new emoji": "🫠🫶🪿🫨🫷🏿",
    "rare scripts": "𓀀𓁐 𐎠𐎡 𝓯𝓪𝓷𝓬𝔂 ᚠᚢᚦ",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A small one: most of its tokens are single bytes, so random ids make every kind of invalid UTF-8."""
    directory = tmp_path_factory.mktemp("bytes")
    write_byte_tokenizer(directory, VOCAB_SIZE)
    return Tokenizer.open(directory)


@pytest.fixture(scope="module")
def llama4_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("llama4")
    write_llama4_tokenizer(directory, Path(llama4.__file__).with_name("tokenizer.model"))
    return Tokenizer.open(directory)


token_ids = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=30)
# Lead, continuation and forbidden bytes of UTF-8 only: what cuts and errors are made of.
hostile_bytes = st.lists(st.sampled_from(b"\x80\x9f\xa0\xbf\xc2\xe0\xed\xef\xf0\xf4\xf5\xffA"), max_size=12).map(bytes)


@settings(max_examples=300)
@given(chunks=st.lists(token_ids, max_size=6), skip_special=st.booleans())
def test_pieces_are_the_whole(chunks: list[list[int]], skip_special: bool, tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special=skip_special)
    streamed = "".join(detokenizer.decode(chunk) for chunk in chunks) + detokenizer.flush()
    assert streamed == tokenizer.decode(chain(*chunks), skip_special=skip_special)


@settings(max_examples=300)
@given(data=hostile_bytes)
def test_invalid_bytes_become_what_the_whole_makes_of_them(data: bytes, tokenizer: Tokenizer) -> None:
    id_of_byte = {tokenizer.token_bytes(i): i for i in range(256)}
    detokenizer = IncrementalDetokenizer(tokenizer)
    streamed = "".join(detokenizer.decode([id_of_byte[bytes([byte])]]) for byte in data) + detokenizer.flush()
    assert streamed == data.decode("utf-8", "replace")


@pytest.mark.parametrize("text", MULTI_BYTE_TEXTS.values(), ids=MULTI_BYTE_TEXTS.keys())
def test_characters_split_over_tokens_come_whole(text: str, llama4_tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(llama4_tokenizer)
    sent = ""
    for token_id in llama4_tokenizer.encode(text, add_bos=False):
        sent += detokenizer.decode([token_id])
        assert text.startswith(sent)
    assert sent == text


def test_a_character_waits_for_its_last_token(llama4_tokenizer: Tokenizer) -> None:
    ids = llama4_tokenizer.encode("𓀀", add_bos=False)
    detokenizer = IncrementalDetokenizer(llama4_tokenizer)
    assert [detokenizer.decode([token_id]) for token_id in ids] == [""] * (len(ids) - 1) + ["𓀀"]
    assert len(ids) > 1


def test_a_character_that_never_ends_comes_out_at_the_finish(llama4_tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(llama4_tokenizer)
    assert detokenizer.decode(llama4_tokenizer.encode("a𓀀", add_bos=False)[:-1]) == "a"
    assert detokenizer.flush() == "\ufffd"


def test_end_of_turn_is_no_text(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.decode(tokenizer.encode_with_specials("Hi!<|eot|>")) == "Hi!"


def test_special_tokens_can_be_shown(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special=False)
    assert detokenizer.decode(tokenizer.encode_with_specials("Hi!<|eot|>")) == "Hi!<|eot|>"


def test_special_names_that_the_model_spelt_out_are_text(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.decode(tokenizer.encode("say <|eot|>", add_bos=False)) == "say <|eot|>"

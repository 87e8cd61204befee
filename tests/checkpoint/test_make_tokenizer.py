"""The tokenizer files that checkpoints get: Llama 4's own, converted, and small ones made up."""

import base64
import json
from pathlib import Path

import llama_models.llama4.tokenizer as llama4
import pytest
from tokenizers import Tokenizer

from checkpoint.errors import CheckpointError
from checkpoint.make_tokenizer import (
    O200K_PATTERN,
    TokenizerIds,
    llama4_special_tokens,
    llama4_tokenizer_json,
    write_byte_tokenizer,
    write_llama4_tokenizer,
    write_trained_tokenizer,
)

TOKENIZER_MODEL = Path(llama4.__file__).with_name("tokenizer.model")
BYTES = [bytes([byte]) for byte in range(256)]
TEXTS = ["The lighthouse keeper kept the light of the lighthouse. " * 3, "Who lights the lighthouse lights the sea."]
CHAT_TOKENS = ("begin_of_text", "end_of_text", "header_start", "header_end", "eom", "eot")


@pytest.fixture(scope="module")
def reference() -> llama4.Tokenizer:
    return llama4.Tokenizer.get_instance()


def test_special_tokens_have_the_reference_names_and_order(reference: llama4.Tokenizer) -> None:
    assert llama4_special_tokens() == sorted(reference.special_tokens, key=reference.special_tokens.__getitem__)


def test_text_is_cut_by_the_reference_pattern(reference: llama4.Tokenizer) -> None:
    assert reference.O200K_PATTERN == O200K_PATTERN


def test_special_ids_follow_the_ordinary_ones(tmp_path: Path) -> None:
    """Of 256 ordinary tokens here; Llama 4's own 200,000 give 200000, 200001 and so on (tests/frontend compares)."""
    _write_model(tmp_path, BYTES)
    ids = write_llama4_tokenizer(tmp_path, tmp_path / "tokenizer.model")
    assert ids == TokenizerIds(bos_token_id=256, eos_token_ids=(257, 263, 264), pad_token_id=274)


def test_each_merged_token_has_one_pair(tmp_path: Path) -> None:
    """The worked example: "ab" and "abc" merge from a|b and ab|c; "bc" is later, so a|bc never comes up."""
    _write_model(tmp_path, [*BYTES, b"ab", b"abc", b"bc"])
    data = json.loads(llama4_tokenizer_json(tmp_path / "tokenizer.model"))
    assert data["model"]["merges"] == ["a b", "ab c", "b c"]


def test_a_token_that_no_pair_makes_is_only_a_whole_word(tmp_path: Path) -> None:
    _write_model(tmp_path, [*BYTES, b"xyz"])
    tokenizer = Tokenizer.from_str(llama4_tokenizer_json(tmp_path / "tokenizer.model"))
    assert tokenizer.encode("xyz", add_special_tokens=False).ids == [256]
    assert tokenizer.encode("xyzx", add_special_tokens=False).tokens == ["x", "y", "z", "x"]


def test_a_missing_tokenizer_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: No such file .* Llama 4 download"):
        llama4_tokenizer_json(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("line", ["IQ==", "IQ== x", "? 0", "IQ== 0 0"])
def test_a_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text(f"IQ== 0\n{line}\n")
    with pytest.raises(CheckpointError, match="line 2 is not a base64 token and its rank"):
        llama4_tokenizer_json(tmp_path / "tokenizer.model")


def test_a_cut_off_tokenizer_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(TOKENIZER_MODEL.read_bytes().splitlines()[:100]))
    with pytest.raises(CheckpointError, match="100 lines do not rank every byte"):
        llama4_tokenizer_json(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("vocab_size", [277, 512, 4096, 32000])
def test_a_byte_tokenizer_has_exactly_the_ids_asked_for(vocab_size: int, tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path, vocab_size)
    ids = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab().values()
    assert sorted(ids) == list(range(vocab_size))


def test_a_byte_tokenizer_ends_in_special_tokens_under_their_real_names(tmp_path: Path) -> None:
    ids = write_byte_tokenizer(tmp_path, 512)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    names = [tokenizer.id_to_token(i) for i in range(ids.bos_token_id, 512)]
    assert {f"<|{name}|>" for name in CHAT_TOKENS} <= set(names)
    assert names == [name for name in llama4_special_tokens() if name in names]
    assert ids.eos_token_ids == tuple(tokenizer.token_to_id(name) for name in ("<|end_of_text|>", "<|eom|>", "<|eot|>"))
    assert ids.pad_token_id == tokenizer.token_to_id("<|finetune_right_pad|>")


@pytest.mark.parametrize("vocab_size", [277, 512, 32000])
def test_a_byte_tokenizer_gives_any_text_back(vocab_size: int, tmp_path: Path) -> None:
    text = "Hello, wörld!\n\tनमस्ते 你好 🙂\x00\u2028"
    write_byte_tokenizer(tmp_path, vocab_size)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_a_byte_tokenizer_has_learnt_some_words(tmp_path: Path) -> None:
    text = "You are a helpful assistant. What is the answer to this question?"
    write_byte_tokenizer(tmp_path, 1024)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert len(tokenizer.encode(text, add_special_tokens=False).ids) < len(text) / 2


@pytest.mark.parametrize("vocab_size", [300, 32000])
def test_the_same_size_gives_the_same_files(vocab_size: int, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_byte_tokenizer(tmp_path / name, vocab_size)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)


@pytest.mark.parametrize("vocab_size", [276, 0, -1])
def test_too_small_a_vocabulary_is_refused(vocab_size: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"vocab_size is {vocab_size}; must be at least 277"):
        write_byte_tokenizer(tmp_path, vocab_size)


@pytest.mark.parametrize("vocab_size", [277, 290, 300])
def test_a_trained_tokenizer_has_exactly_the_ids_asked_for(vocab_size: int, tmp_path: Path) -> None:
    write_trained_tokenizer(tmp_path, vocab_size, iter(TEXTS))
    ids = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab().values()
    assert sorted(ids) == list(range(vocab_size))


def test_a_text_whose_pairs_are_used_up_gives_fewer_ids(tmp_path: Path) -> None:
    """Still without a gap, the special ones last."""
    ids = write_trained_tokenizer(tmp_path, 1024, ["ab ab"])
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert sorted(tokenizer.get_vocab().values()) == list(range(tokenizer.get_vocab_size()))
    assert (ids.bos_token_id, tokenizer.get_vocab_size()) == (258, 279)


def test_a_trained_tokenizer_ends_in_special_tokens_under_their_real_names(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path / "made up", 300)
    ids = write_trained_tokenizer(tmp_path / "trained", 300, TEXTS)
    made_up, trained = (Tokenizer.from_file(str(tmp_path / name / "tokenizer.json")) for name in ("made up", "trained"))
    last = range(ids.bos_token_id, 300)
    assert [trained.id_to_token(i) for i in last] == [made_up.id_to_token(i) for i in last]
    assert trained.encode("Hi").ids[0] == ids.bos_token_id


def test_a_trained_tokenizer_has_learnt_the_texts_words(tmp_path: Path) -> None:
    write_trained_tokenizer(tmp_path, 300, TEXTS)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode(" lighthouse", add_special_tokens=False).tokens == ["Ġlighthouse"]


def test_a_trained_tokenizer_gives_any_text_back(tmp_path: Path) -> None:
    """Also what it was not learnt from."""
    text = "The lighthouse, wörld!\n\tनमस्ते 你好 🙂\x00\u2028"
    write_trained_tokenizer(tmp_path, 300, TEXTS)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_the_same_texts_give_the_same_tokenizer(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_trained_tokenizer(tmp_path / name, 300, TEXTS)
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / "two/tokenizer.json").read_bytes()


def test_too_small_a_trained_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="vocab_size is 276; must be at least 277"):
        write_trained_tokenizer(tmp_path, 276, TEXTS)


def test_transformers_reads_the_files_and_begins_a_text_with_bos(tmp_path: Path) -> None:
    from transformers import AutoTokenizer  # 3 s

    ids = write_byte_tokenizer(tmp_path, 512)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("Hi").input_ids[0] == tokenizer.bos_token_id == ids.bos_token_id
    assert tokenizer.pad_token_id == ids.pad_token_id


def _write_model(directory: Path, ranked: list[bytes]) -> None:
    """A tokenizer.model with these tokens, in the order of their ranks."""
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(ranked)]
    (directory / "tokenizer.model").write_bytes(b"\n".join(lines))

"""What the files of a tokenizer may say, as transformers reads them, and what they can get wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from checkpoint.errors import CheckpointError
from checkpoint.make_tokenizer import write_byte_tokenizer
from checkpoint.tokenizer import Tokenizer

Edit = Callable[[str, Callable[[Any], None]], None]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A checkpoint directory with a small tokenizer, to break."""
    write_byte_tokenizer(tmp_path, 300)
    return tmp_path


@pytest.fixture
def edit(directory: Path) -> Edit:
    """edit(name, change) applies `change` to a JSON file of the directory, which need not exist."""

    def edit(name: str, change: Callable[[Any], None]) -> None:
        path = directory / name
        data = json.loads(path.read_text()) if path.exists() else {}
        change(data)
        path.write_text(json.dumps(data))

    return edit


def test_bos_is_what_tokenizer_config_names(directory: Path, edit: Edit) -> None:
    edit("tokenizer_config.json", lambda data: data.update(bos_token={"content": "<|eom|>", "special": True}))
    edit("config.json", lambda data: data.update(bos_token_id=279))
    tokenizer = Tokenizer.open(directory)
    assert tokenizer.bos_token_id == tokenizer.special_tokens["<|eom|>"]


def test_a_null_bos_is_none(directory: Path, edit: Edit) -> None:
    edit("tokenizer_config.json", lambda data: data.update(bos_token=None))
    edit("config.json", lambda data: data.update(bos_token_id=279))
    tokenizer = Tokenizer.open(directory)
    assert tokenizer.bos_token_id is None
    assert tokenizer.encode("Hi", add_bos=True) == tokenizer.encode("Hi", add_bos=False)


@pytest.mark.parametrize("config", [{"bos_token_id": 280}, {"text_config": {"bos_token_id": 280}}])
def test_bos_falls_back_on_config_json(config: dict[str, Any], directory: Path, edit: Edit) -> None:
    (directory / "tokenizer_config.json").unlink()
    edit("config.json", lambda data: data.update(config))
    assert Tokenizer.open(directory).bos_token_id == 280


def test_added_tokens_that_are_not_special_are_words(directory: Path, edit: Edit) -> None:
    word = {"id": 300, "content": "Drover", "special": False, "normalized": False}
    word |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    edit("tokenizer.json", lambda data: data["added_tokens"].append(word))
    tokenizer = Tokenizer.open(directory)
    assert tokenizer.encode("Drover", add_bos=False) == [300]
    assert tokenizer.decode([300], skip_special=True) == "Drover"


def test_truncation_in_the_file_is_ignored(directory: Path, edit: Edit) -> None:
    limit = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    edit("tokenizer.json", lambda data: data.update(truncation=limit))
    tokenizer = Tokenizer.open(directory)
    assert tokenizer.decode(tokenizer.encode("a long text", add_bos=False)) == "a long text"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file; copy it"):
        Tokenizer.open(tmp_path)


def test_a_cut_off_file_is_named(directory: Path) -> None:
    path = directory / "tokenizer.json"
    path.write_text(path.read_text()[:1000])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not JSON .* download the file again"):
        Tokenizer.open(directory)


def test_json_that_is_no_tokenizer_is_refused(directory: Path) -> None:
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.open(directory)


def test_a_gap_before_an_added_token_is_refused(directory: Path, edit: Edit) -> None:
    edit("tokenizer.json", lambda data: data["added_tokens"][-1].update(id=400))
    with pytest.raises(CheckpointError, match=r"the id of '<\|reasoning_thinking_end\|>' does not follow"):
        Tokenizer.open(directory)


def test_a_tokenizer_that_normalizes_is_refused(directory: Path, edit: Edit) -> None:
    edit("tokenizer.json", lambda data: data.update(normalizer={"type": "NFC"}))
    with pytest.raises(CheckpointError, match="does not give text back unchanged; Drover reads byte-level BPE"):
        Tokenizer.open(directory)


def test_a_tokenizer_not_made_of_bytes_is_refused(directory: Path, edit: Edit) -> None:
    def replace_last_token(data: Any) -> None:
        vocab = data["model"]["vocab"]
        vocab["▁the"] = vocab.pop(list(vocab)[-1])
        data["model"]["merges"].pop()

    edit("tokenizer.json", replace_last_token)
    with pytest.raises(CheckpointError, match="token '▁the' is not made of bytes"):
        Tokenizer.open(directory)


def test_a_tokenizer_of_another_type_is_refused(directory: Path, edit: Edit) -> None:
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]], "byte_fallback": False}
    edit("tokenizer.json", lambda data: data.update(model=unigram, added_tokens=[], post_processor=None))
    with pytest.raises(CheckpointError, match="is a 'Unigram' tokenizer; Drover reads byte-level BPE"):
        Tokenizer.open(directory)


def test_a_vocabulary_without_some_byte_is_refused(directory: Path, edit: Edit) -> None:
    def keep_one_token(data: Any) -> None:
        data["model"].update(vocab={"!": 0}, merges=[])
        for token_id, token in enumerate(data["added_tokens"], start=1):
            token["id"] = token_id

    edit("tokenizer.json", keep_one_token)
    with pytest.raises(CheckpointError, match="has no token for byte 0x00"):
        Tokenizer.open(directory)


def test_special_tokens_that_must_be_whole_words_are_refused(directory: Path, edit: Edit) -> None:
    edit("tokenizer.json", lambda data: data["added_tokens"][0].update(single_word=True))
    with pytest.raises(CheckpointError, match=r"special token '<\|begin_of_text\|>' has single_word"):
        Tokenizer.open(directory)


def theirs(directory: Path, text: str, **options: bool) -> list[int]:
    """What transformers makes of a text in which names of special tokens are tokens."""
    ids: list[int] = PreTrainedTokenizerFast.from_pretrained(directory)(text, **options)["input_ids"]
    return ids


@pytest.mark.parametrize("flags", [{"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}], ids=str)
@pytest.mark.parametrize(
    "text", ["a <|eot|> b", "a\n\t <|eot|><|eot|>  b", " <|eot|> ", "<|eot|>", "a<|eom|> <|eot|>b"]
)
def test_special_tokens_take_white_space_along_as_in_transformers(
    flags: dict[str, bool], text: str, directory: Path, edit: Edit
) -> None:
    def strip(data: Any) -> None:
        next(token for token in data["added_tokens"] if token["content"] == "<|eot|>").update(flags)

    edit("tokenizer.json", strip)
    assert Tokenizer.open(directory).encode_with_specials(text) == theirs(directory, text, add_special_tokens=False)


def in_decoder(edit: Edit, token_id: int) -> None:
    token = {"content": "<|new|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    edit("tokenizer_config.json", lambda data: data.update(added_tokens_decoder={str(token_id): token}))


def test_tokens_that_the_tokenizers_config_adds_are_special_tokens(directory: Path, edit: Edit) -> None:
    token_id = Tokenizer.open(directory).vocab_size
    in_decoder(edit, token_id)
    tokenizer = Tokenizer.open(directory)
    assert tokenizer.special_tokens["<|new|>"] == token_id
    assert tokenizer.decode([token_id]) == "<|new|>"
    text = "Hi<|new|>!"
    assert tokenizer.encode_with_specials(text) == theirs(directory, text, add_special_tokens=False)


def test_tokens_of_added_tokens_json_are_special_tokens(directory: Path) -> None:
    token_id = Tokenizer.open(directory).vocab_size
    (directory / "added_tokens.json").write_text(json.dumps({"<|two|>": token_id + 1, "<|one|>": token_id}))
    special = Tokenizer.open(directory).special_tokens
    assert (special["<|one|>"], special["<|two|>"]) == (token_id, token_id + 1)


def test_an_added_token_with_a_gap_before_it_is_refused(directory: Path, edit: Edit) -> None:
    in_decoder(edit, Tokenizer.open(directory).vocab_size + 5)
    with pytest.raises(CheckpointError, match=r"the id of '<\|new\|>' does not follow"):
        Tokenizer.open(directory)


@pytest.mark.parametrize("adds", [True, False])
def test_a_text_begins_with_bos_only_where_the_tokenizer_adds_it(directory: Path, edit: Edit, adds: bool) -> None:
    if not adds:
        edit("tokenizer.json", lambda data: data.update(post_processor=None))
    tokenizer = Tokenizer.open(directory)
    assert tokenizer.adds_bos == adds
    assert tokenizer.encode("Hello", add_bos=True) == theirs(directory, "Hello")


def test_the_tokenizer_names_its_own_end_token(directory: Path, edit: Edit) -> None:
    tokenizer = Tokenizer.open(directory)
    assert tokenizer.eos_token_id == tokenizer.special_tokens["<|eot|>"]
    edit("tokenizer_config.json", lambda data: data.update(eos_token=None))
    assert Tokenizer.open(directory).eos_token_id is None


PANICS = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}


def test_a_regular_expression_that_gives_up_refuses_the_text_and_no_other(directory: Path, edit: Edit) -> None:
    """tokenizers panics, which Python sees as an error that is no Exception."""
    edit("tokenizer.json", lambda data: data["pre_tokenizer"]["pretokenizers"].__setitem__(0, PANICS))
    tokenizer = Tokenizer.open(directory)
    with pytest.raises(CheckpointError, match="the checkpoint's tokenizer cannot encode this text: Onig: Regex search"):
        tokenizer.encode("x" * 40 + "z", add_bos=False)
    assert tokenizer.decode(tokenizer.encode("Hello", add_bos=False)) == "Hello"


@pytest.mark.parametrize("token_id", [10**12, -1, "7", 1.5, None, True])
def test_an_id_that_is_none_is_refused(directory: Path, edit: Edit, token_id: object) -> None:
    edit("tokenizer.json", lambda data: data["added_tokens"][-1].update(id=token_id))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.open(directory)


def test_any_token_may_be_named_as_beginning_and_end(directory: Path, edit: Edit) -> None:
    edit("tokenizer_config.json", lambda data: data.update(bos_token="e", eos_token="a"))
    tokenizer, reference = Tokenizer.open(directory), PreTrainedTokenizerFast.from_pretrained(directory)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (reference.bos_token_id, reference.eos_token_id)
    assert tokenizer.encode_with_specials("e") == [reference.bos_token_id]
    assert tokenizer.encode("Hello", add_bos=True) == tokenizer.encode("Hello", add_bos=False)


def test_a_beginning_that_the_tokenizer_lacks_is_none(directory: Path, edit: Edit) -> None:
    edit("tokenizer_config.json", lambda data: data.update(bos_token="<s>"))
    assert Tokenizer.open(directory).bos_token_id is None
    (directory / "tokenizer_config.json").unlink()
    edit("config.json", lambda data: data.update(bos_token_id=5))
    assert Tokenizer.open(directory).bos_token_id is None


@pytest.mark.parametrize("decoder", [True, False])
def test_special_tokens_map_counts_where_transformers_reads_it(directory: Path, edit: Edit, decoder: bool) -> None:
    edit("special_tokens_map.json", lambda data: data.update(eos_token="<|eom|>"))
    if decoder:
        token_id = Tokenizer.open(directory).special_tokens["<|eom|>"]
        known = {str(token_id): {"content": "<|eom|>", "special": True}}
        edit("tokenizer_config.json", lambda data: data.update(added_tokens_decoder=known))
    theirs_id = PreTrainedTokenizerFast.from_pretrained(directory).eos_token_id
    assert Tokenizer.open(directory).eos_token_id == theirs_id
    assert (theirs_id == Tokenizer.open(directory).special_tokens["<|eom|>"]) != decoder


def add_special(edit: Edit, *names: str) -> None:
    def change(data: Any) -> None:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for name in names:
            token_id = max(token["id"] for token in data["added_tokens"]) + 1
            data["added_tokens"].append({"id": token_id, "content": name, "special": True, **flags})

    edit("tokenizer.json", change)


def test_special_tokens_may_have_long_names_that_begin_alike(directory: Path, edit: Edit) -> None:
    names = ["<" + "x" * length for length in (30, 31, 32, 500, 3000)] + ["<" + "x" * 400 + "y", "<" + "x" * 31 + "z"]
    add_special(edit, *names)
    tokenizer = Tokenizer.open(directory)
    for name in names:
        assert tokenizer.encode_with_specials(name) == [tokenizer.special_tokens[name]]
    assert next(iter(tokenizer.split_specials("<" + "x" * 450))) == tokenizer.special_tokens["<" + "x" * 32]
    assert tokenizer.special_starts("a <" + "x" * 2000) == [2, 2]
    assert tokenizer.special_starts("a <" + "x" * 20) == [2]
    assert tokenizer.special_starts("a <" + "x" * 20 + "y") == []


def test_a_name_beyond_all_reason_is_refused(directory: Path, edit: Edit) -> None:
    add_special(edit, "<" + "x" * 100_000)
    with pytest.raises(CheckpointError, match=r"has 100001 letters; at most 4096") as caught:
        Tokenizer.open(directory)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", {"<|new|>": "7"}),
        ("added_tokens.json", {"<|new|>": None}),
        ("tokenizer_config.json", {"added_tokens_decoder": [7]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"300": {}}}),
    ],
)
def test_a_fault_in_a_file_beside_is_told_of_that_file(directory: Path, name: str, content: object) -> None:
    (directory / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.open(directory)
    assert str(caught.value).startswith(f"{directory / name}: ")
    assert str(caught.value).count("download the file again") == 1


def test_a_post_processor_that_names_no_token_refuses_the_file(directory: Path, edit: Edit) -> None:
    """tokenizers panics only when it encodes."""
    single = [{"SpecialToken": {"id": "<|nobody|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {}}
    edit("tokenizer.json", lambda data: data.update(post_processor=template))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.open(directory)

"""Writes a checkpoint's tokenizer files: converted from Meta's `tokenizer.model`, or for a small made-up vocabulary.

Both write the files of a Hugging Face checkpoint: tokenizer.json, tokenizer_config.json and
chat_template.jinja. Meta's licence does not let us ship the real vocabulary. The names and ids of
special tokens, the split pattern and the chat format are facts (llama-models 0.3.0,
`llama4/tokenizer.py`).
"""

import base64
import binascii
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as HFTokenizer
from tokenizers.trainers import BpeTrainer

from checkpoint.errors import CheckpointError

NUM_LLAMA4_SPECIAL_TOKENS = 2048

BOS = "<|begin_of_text|>"
EOS = ("<|end_of_text|>", "<|eom|>", "<|eot|>")
PAD = "<|finetune_right_pad|>"

_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# Llama 4 splits text by this before merging: words, numbers of up to three digits, punctuation,
# line ends, spaces.
O200K_PATTERN = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# Llama 4's format. A message is a header with the role, an empty line, the text and an end-of-turn
# token. The role of a tool's answer is "ipython".
LLAMA4_CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- set role = "ipython" if message.role == "tool" else message.role %}
    {{- "<|header_start|>" + role + "<|header_end|>\\n\\n" + message.content + "<|eot|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|header_start|>assistant<|header_end|>\\n\\n" }}
{%- endif %}
"""

# The small tokenizer is trained on this. Text in many scripts then takes fewer tokens than bytes.
_SAMPLE_TEXT = """\
The small machine in the corner had been counting drops of rain since the morning, and nobody had asked it to. When
the children came home from school they wanted to know how many there were. "About nine thousand," it said, "but I
have not finished." They thought that this was very funny, and they told everyone in the street what it had said.
How does a large language model answer a question? It reads the words which came before, gives every possible next
word a number, and takes one of those with the highest numbers. Then it does the same thing again, and again, until
the text is done. That is all there is to it; the interesting part is where the numbers come from. Most of the work
is multiplying matrices, some of which are so large that they have to be shared out between several computers.
You are a helpful assistant. Please write a short story about a dog and a cat who live in the same house. Sure! Here
is a story: Once upon a time, there was a dog who could not sleep because the cat would only sing at night...
What can I do if I don't know the answer? You could say that you're not sure; it isn't wrong to be unsure, and we'll
find out together. I've seen people who'd rather guess, but they're often mistaken. Yes, no, hello, thank you, goodbye.
In 2024, 3 of 10 servers failed; by 2025 only 1 did. The price went from $1,250.00 to $999.99 (a change of -20%).
def main(path: str) -> int:
    for index, line in enumerate(open(path)):
        if line.startswith("#"):
            continue
        print(index, line.strip(), end="\n\n")
    return 0
{"name": "example", "values": [0, 1, 2, true, false, null]} <p class="text">https://www.example.com/index.html</p>
Der kleine Hund und die alte Katze schlafen nicht, weil es auf der Straße zu laut ist. Das ist schön für uns.
Le petit chien et le vieux chat ne dorment pas, parce que la rue est trop bruyante. C'est très bien pour nous.
El perro pequeño y el gato viejo no duermen porque en la calle hay mucho ruido. ¿Qué quieres hacer mañana?
O cão pequeno e o gato velho não dormem. Il cane piccolo e il gatto vecchio non dormono, perché fa caldo.
Маленькая собака и старый кот не спят, потому что на улице очень шумно. Что ты хочешь делать завтра?
小さな犬と年を取った猫は眠れません。明日は何をしたいですか。我们今天想学习一种新的语言。你好世界。
작은 개와 늙은 고양이는 잠을 자지 않습니다. الكلب الصغير والقط العجوز لا ينامان. छोटा कुत्ता और बूढ़ी बिल्ली सोते नहीं हैं।
"""


@dataclass(frozen=True)
class TokenizerIds:
    """The tokenizer's fields in config.json. Any of eos_token_ids ends a text."""

    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int


def llama4_special_tokens() -> list[str]:
    """The names of Llama 4's 2048 special tokens, in order of their ids (the first is 200000)."""

    def reserved(kind: str, start: int, stop: int) -> list[str]:
        return [f"<|{kind}reserved_special_token_{i}|>" for i in range(start, stop)]

    def named(*names: str) -> list[str]:
        return [f"<|{name}|>" for name in names]

    tokens = [
        *named("begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix"),
        *named("header_start", "header_end", "eom", "eot", "step"),
        *reserved("text_post_train_", 0, 6),
        *named("python_start", "python_end", "finetune_right_pad"),
        *reserved("text_post_train_", 8, 69),  # there is no 6 and no 7
        *named("image_start", "image_end"),
        *reserved("vision_", 0, 2),
        *named("tile_x_separator", "tile_y_separator"),
        *reserved("vision_", 2, 6),
        *named("image"),
        *reserved("vision_", 6, 7),
        *named("patch"),
        *reserved("vision_", 7, 1048),
        *reserved("reasoning_", 0, 8),
        *named("reasoning_thinking_start", "reasoning_thinking_end"),
    ]
    return tokens + reserved("", 0, NUM_LLAMA4_SPECIAL_TOKENS - len(tokens))


def llama4_tokenizer_json(tokenizer_model: Path) -> str:
    """Convert Meta's `tokenizer.model` (one base64 token and its rank per line) to the text of a tokenizer.json.

    Takes a few seconds. Raises CheckpointError if the file is missing or damaged.
    """
    ranks = _read_ranks(tokenizer_model)
    letters = byte_letters()
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [f"{names[left]} {names[right]}" for left, right in _recover_merges(ranks)]
    return _tokenizer_json(
        [names[token] for token in sorted(ranks, key=ranks.__getitem__)], merges, llama4_special_tokens()
    )


def write_llama4_tokenizer(directory: Path, tokenizer_model: Path) -> TokenizerIds:
    """Write the real Llama 4 tokenizer's files from Meta's `tokenizer.model`, with our chat template.

    Raises CheckpointError if `tokenizer_model` is missing or damaged.
    """
    return _write_files(directory, llama4_tokenizer_json(tokenizer_model))


def write_byte_tokenizer(directory: Path, vocab_size: int) -> TokenizerIds:
    """Write a small working tokenizer with exactly `vocab_size` ids, for a checkpoint with random weights.

    Ids in order: the 256 bytes, merges learnt from a short sample text, pairs of learnt tokens
    once the sample has no more pairs, and Llama 4's special tokens except reserved ones, under
    their real names. The same vocab_size always gives the same files. Raises CheckpointError if
    vocab_size is too small.
    """
    special = _named_special_tokens()
    num_ordinary = vocab_size - len(special)
    tokens, merges = _learn_merges([_SAMPLE_TEXT], vocab_size, special)
    _add_pairs(tokens, merges, num_ordinary)
    return _write_files(directory, _tokenizer_json(tokens, merges, special))


def write_trained_tokenizer(directory: Path, vocab_size: int, texts: Iterable[str]) -> TokenizerIds:
    """Write a byte-level BPE tokenizer learnt from `texts`, with `vocab_size` ids if the texts have enough pairs.

    Ids in order: the 256 bytes, the learnt merges, and Llama 4's special tokens except reserved
    ones, under their real names. Raises CheckpointError if vocab_size is too small.
    """
    special = _named_special_tokens()
    tokens, merges = _learn_merges(texts, vocab_size, special)
    return _write_files(directory, _tokenizer_json(tokens, merges, special))


def _named_special_tokens() -> list[str]:
    return [name for name in llama4_special_tokens() if "reserved_special_token" not in name]


def _learn_merges(texts: Iterable[str], vocab_size: int, special: Sequence[str]) -> tuple[list[str], list[str]]:
    """(ordinary tokens in order of their ids, the merges that build them)."""
    num_ordinary = vocab_size - len(special)
    if num_ordinary < 256:
        raise CheckpointError(
            f"vocab_size is {vocab_size}; must be at least {256 + len(special)} "
            f"(256 bytes and {len(special)} special tokens)"
        )
    letters = byte_letters()
    tokenizer = HFTokenizer.from_str(_tokenizer_json(letters, [], special))
    trainer = BpeTrainer(vocab_size=num_ordinary, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(learnt["vocab"], key=learnt["vocab"].__getitem__)
    return tokens, [" ".join(pair) for pair in learnt["merges"]]


def _read_ranks(tokenizer_model: Path) -> dict[bytes, int]:
    try:
        lines = tokenizer_model.read_bytes().splitlines()
    except OSError as error:
        raise CheckpointError(
            f"{tokenizer_model}: {error.strerror}; give the tokenizer.model of a Llama 4 download"
        ) from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise CheckpointError(
                f"{tokenizer_model}: line {number} is not a base64 token and its rank; download the file again"
            ) from error
    missing_bytes = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing_bytes or sorted(ranks.values()) != list(range(len(ranks))):
        raise CheckpointError(
            f"{tokenizer_model}: {len(lines)} lines do not rank every byte and count up from 0; download the file again"
        )
    return ranks


def _recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair from which byte-pair encoding builds each token, in order of rank. tiktoken stores ranks only.

    Each token has at most one such pair. A pair merges into a token only if nothing merged across
    the token's ends before. So the merges inside the token are the same as for the token alone.
    Encoding each token alone, down to its last two parts, therefore gives its pair, and the result
    encodes every text as tiktoken does.
    """
    merges = []
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [(ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1)]
            rank, i = min(joined)
            if rank == len(ranks):  # no text merges into this token: only a whole word equal to it encodes to it
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def byte_letters() -> list[str]:
    """The visible letter for each byte in a byte-level tokenizer.json (GPT-2's table)."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = itertools.count(256)
    return [chr(byte) if byte in visible else chr(next(others)) for byte in range(256)]


def _add_pairs(tokens: list[str], merges: list[str], num_tokens: int) -> None:
    """Append pairs of the learnt tokens, most frequent first, until there are `num_tokens` tokens."""
    known = set(tokens)
    for total in itertools.count():
        for left in range(total + 1):
            if len(tokens) == num_tokens:
                return
            first, second = tokens[256 + left], tokens[256 + total - left]
            if first + second not in known:
                known.add(first + second)
                tokens.append(first + second)
                merges.append(f"{first} {second}")


def _tokenizer_json(tokens: Sequence[str], merges: Sequence[str], special: Sequence[str]) -> str:
    """The text of a tokenizer.json.

    tokens, special: names in order of their ids; special ids follow the others.
    """
    added = [
        {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for i, name in enumerate(special, start=len(tokens))
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": O200K_PATTERN}, "behavior": "Isolated", "invert": False}
    bos = {"SpecialToken": {"id": BOS, "type_id": 0}}
    text = [{"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B")]
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text[0]],
            "pair": [bos, text[0], bos, text[1]],
            "special_tokens": {BOS: {"id": BOS, "ids": [len(tokens) + special.index(BOS)], "tokens": [BOS]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # like tiktoken: a whole word that is a token needs no merging
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    return json.dumps(data, ensure_ascii=False)


def _write_files(directory: Path, tokenizer_json: str) -> TokenizerIds:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": "<|eot|>",
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(LLAMA4_CHAT_TEMPLATE, encoding="utf-8")
    return read_token_ids(directory)


def read_token_ids(directory: Path) -> TokenizerIds:
    """The ids in tokenizer files that a function of this module wrote, for config.json."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    return TokenizerIds(ids[BOS], tuple(ids[name] for name in EOS), ids[PAD])

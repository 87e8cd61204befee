"""Converts text to token ids and back, by a checkpoint's tokenizer.json.

Llama 4 uses byte-pair encoding over bytes. Each token is a fixed string of bytes, so any text can
be encoded and decodes to itself. Special tokens such as `<|eot|>` have an id and a name. In a
user's text that name is plain text. It means the token only in text that the server itself wrote.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from checkpoint.errors import CheckpointError, quoted
from checkpoint.make_tokenizer import byte_letters
from checkpoint.read_file import MAX_BYTES, parse_json, read_text
from checkpoint.special_names import longest_match_pattern
from checkpoint.tokenizer_files import FIX, named_bos_token_id, token_name, tokenizer_settings, tokens_beside

_KIND = "Drover reads byte-level BPE tokenizers, the kind that Llama 4 has"

# Far above any vocabulary: a table of this length must not eat the memory.
_MAX_TOKEN_ID = 2**24
# Of a special token's name, in letters; real ones have fewer than 50.
_MAX_NAME = 4096

# Tokenizers of another kind normalize text or add spaces. This text then does not decode to itself.
_PROBE = "  Drover's 1st\n\tcafe\u0301 ß 你好 🐕 "


class Tokenizer:
    """One checkpoint's tokenizer. Immutable, so threads may share it.

    vocab_size: the highest token id plus 1.
    bos_token_id: the beginning-of-text token; None if the model has none. adds_bos: whether a text
    begins with it, as tokenizer.json's post-processor says. eos_token_id: the token that ends a
    turn, as tokenizer_config.json names it.
    max_token_bytes: length of the longest token. N bytes of text are at least N / max_token_bytes
    tokens.
    special_tokens: the id of each special token, by name.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        token_bytes: list[bytes],
        special_tokens: dict[str, int],
        bos_token_id: int | None,
        eos_token_id: int | None = None,
        adds_bos: bool = False,
        strips: Mapping[int, "_Strips"] | None = None,
    ) -> None:
        """Use `Tokenizer.open`. token_bytes is indexed by token id; b"" for ids without a token.

        strips: the special tokens that take the white space around them along.
        """
        # By default `tokenizers` encodes a special token's name in any text as the token. This
        # turns that off. `encode_with_specials` finds the names itself, so one backend (about 100
        # MB for Llama 4) serves both.
        backend.encode_special_tokens = True
        self._backend = backend
        self._token_bytes = token_bytes
        pattern = longest_match_pattern(special_tokens)
        self._special_pattern = re.compile(pattern)
        self._special_start_pattern = re.compile(f"(?={pattern})")
        self._sorted_names = sorted(special_tokens)
        self._first_letters = frozenset(name[0] for name in special_tokens)
        self._longest_name = max(map(len, special_tokens), default=0)
        self._special_ids = frozenset(special_tokens.values())
        self.special_tokens = special_tokens
        self.vocab_size = len(token_bytes)
        self.max_token_bytes = max(map(len, token_bytes))
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.adds_bos = adds_bos
        self._strips = strips or {}

    @classmethod
    def open(cls, directory: Path) -> "Tokenizer":
        """Read a checkpoint's tokenizer.json, and find its beginning-of-text token.

        That token is `bos_token` in tokenizer_config.json, as in Hugging Face's tokenizers; null
        there means none. If the file or the key is absent, it is `bos_token_id` in config.json.
        Raises CheckpointError if a file is missing, damaged, or describes a tokenizer of another
        kind.
        """
        path = directory / "tokenizer.json"
        text = read_text(path, MAX_BYTES)
        data = parse_json(path, text)
        settings = tokenizer_settings(directory)
        beside = tokens_beside(directory, settings)
        with _refusing(path):
            backend = tokenizers.Tokenizer.from_str(text)
            vocab = data["model"]["vocab"]
        if not isinstance(vocab, dict):
            raise CheckpointError(f"{path}: is a {quoted(data['model'].get('type'))} tokenizer; {_KIND}")
        with _refusing(path):
            added: list[dict[str, Any]] = list(data.get("added_tokens") or [])
            added += _add_tokens(backend, beside)
            misplaced = [token["content"] for token in added if backend.token_to_id(token["content"]) != token["id"]]
            ids = [*vocab.values(), *(token["id"] for token in added)]
            if not all(type(token_id) is int and 0 <= token_id <= _MAX_TOKEN_ID for token_id in ids):
                raise ValueError(f"token ids must go from 0 to {_MAX_TOKEN_ID}")
        if misplaced:  # where ids have gaps, `tokenizers` silently renumbers added tokens
            raise CheckpointError(f"{path}: the id of {quoted(misplaced[0])} does not follow the one before; {FIX}")
        special = [token for token in added if token.get("special")]
        special_tokens = {token["content"]: token["id"] for token in special if token["content"]}
        for token in special:
            _check_special(token, path)
        named = [token_name(settings.get(key)) for key in ("bos_token", "eos_token")]
        for name in named:  # any token of the vocabulary may be named, which makes it special
            if name and (token_id := vocab.get(name)) is not None:
                special_tokens.setdefault(name, token_id)
        bos_token_id = named_bos_token_id(directory, settings, special_tokens)
        eos_token_id = special_tokens.get(named[1] or "")
        strips = {token["id"]: _Strips(bool(token.get("lstrip")), bool(token.get("rstrip"))) for token in special}
        strips = {token_id: each for token_id, each in strips.items() if each.before or each.after}
        table = _bytes_by_id(vocab, added, path)
        with _refusing(path):
            backend.no_truncation()
            backend.no_padding()
            adds_bos = bos_token_id is not None and backend.encode("").ids[:1] == [bos_token_id]
        tokenizer = cls(backend, table, special_tokens, bos_token_id, eos_token_id, adds_bos, strips)
        if tokenizer.decode(tokenizer.encode(_PROBE, add_bos=False)) != _PROBE:
            raise CheckpointError(f"{path}: does not give text back unchanged; {_KIND}")
        return tokenizer

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        """Encode a user's text: names of special tokens stay plain text.

        A lone surrogate becomes U+FFFD.

        add_bos: put bos_token_id in front, if this tokenizer does that. Raises CheckpointError if
        the checkpoint's tokenizer breaks on this text, as its regular expression may.
        """
        try:
            try:
                ids = self._ids(text)
            except TypeError:  # not valid Unicode: JSON can escape half a surrogate pair
                ids = self._ids(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        except BaseException as error:
            _raise_unless_broken(error)
            raise CheckpointError(f"the checkpoint's tokenizer cannot encode this text: {_one_line(error)}") from None
        return [self.bos_token_id, *ids] if add_bos and self.bos_token_id is not None and self.adds_bos else ids

    def _ids(self, text: str) -> list[int]:
        # Of the backend's methods, those for batches alone release the GIL: `encode` holds up every
        # thread for 2.7 s for 4 MB of text.
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids

    def encode_with_specials(self, text: str) -> list[int]:
        """Encode text that the server wrote: the name of a special token becomes that token.

        No bos is added.
        """
        ids: list[int] = []
        for part in self.split_specials(text):
            ids += [part] if isinstance(part, int) else self.encode(part, add_bos=False)
        return ids

    def split_specials(self, text: str) -> Iterator[str | int]:
        """The text in pieces: special tokens as ids, and the non-empty texts between them.

        Of overlapping names the first counts; of names with the same start, the longest. A token
        may take the white space before or after it along.
        """
        end, before = 0, _NO_STRIPS
        for match in self._special_pattern.finditer(text):
            token_id = self.special_tokens[match[0]]
            strips = self._strips.get(token_id, _NO_STRIPS)
            if between := _stripped(text[end : match.start()], before.after, strips.before):
                yield between
            yield token_id
            end, before = match.end(), strips
        if rest := _stripped(text[end:], before.after, False):
            yield rest

    def special_starts(self, text: str) -> list[int]:
        """Every offset where a special token's name starts, even inside another or cut off by the text's end.

        Trailing white space is ignored for cut-off names: a template may strip it before it
        appends more text.
        """
        starts = [match.start() for match in self._special_start_pattern.finditer(text)]
        stripped = text.rstrip()
        first = max(0, len(stripped) - self._longest_name)
        ends = (i for i in range(first, len(stripped)) if stripped[i] in self._first_letters)
        return starts + [i for i in ends if self._begins_a_name(stripped[i:])]

    def _begins_a_name(self, text: str) -> bool:
        """Whether a special token's name goes on after `text`. Names that do follow it directly in their order."""
        following = bisect_right(self._sorted_names, text)
        return following < len(self._sorted_names) and self._sorted_names[following].startswith(text)

    def decode(self, token_ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of tokens. Special tokens appear as their names. Invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(token_ids, skip_special=skip_special).decode("utf-8", "replace")

    def decode_bytes(self, token_ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """The concatenated bytes of tokens. They may end inside a character."""
        special = self._special_ids if skip_special else ()
        return b"".join(self.token_bytes(token_id) for token_id in token_ids if token_id not in special)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token; for a special token, its name.

        Ids without a token give b"": a model may have more ids than its tokenizer, to round up its
        matrices.
        """
        assert token_id >= 0
        return self._token_bytes[token_id] if token_id < self.vocab_size else b""

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids


@dataclass(frozen=True)
class _Strips:
    """Whether a special token takes the white space before it, or after it, along (lstrip, rstrip)."""

    before: bool
    after: bool


_NO_STRIPS = _Strips(before=False, after=False)


def _stripped(text: str, left: bool, right: bool) -> str:
    text = text.lstrip() if left else text
    return text.rstrip() if right else text


def _raise_unless_broken(error: BaseException) -> None:
    """Raise the error again unless it tells of a broken tokenizer: an Exception, or a panic.

    A panic of the Rust library is no Exception; its class cannot be imported.
    """
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Whatever fails in the block means that the file at `path` is no tokenizer: CheckpointError."""
    try:
        yield
    except BaseException as error:  # `tokenizers` raises plain Exception, or panics, for whatever it cannot read
        _raise_unless_broken(error)
        raise CheckpointError(f"{path}: not a tokenizer ({_one_line(error)}); {FIX}") from None


def _check_special(token: dict[str, Any], path: Path) -> None:
    name = token["content"]
    if len(name) > _MAX_NAME:
        raise CheckpointError(f"{path}: special token {quoted(name)} has {len(name)} letters; at most {_MAX_NAME}")
    if token.get("single_word"):
        raise CheckpointError(
            f"{path}: special token {quoted(name)} has single_word; "
            "Drover reads tokenizers whose special tokens count wherever they stand, as Llama 4's do"
        )


def _add_tokens(backend: tokenizers.Tokenizer, tokens: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add those that the tokenizer lacks, and return them."""
    lacking = [token for token in tokens if backend.token_to_id(token["content"]) is None]
    for token in lacking:
        flags = {flag: bool(token.get(flag)) for flag in ("single_word", "lstrip", "rstrip", "normalized")}
        made = tokenizers.AddedToken(token["content"], special=bool(token.get("special")), **flags)
        (backend.add_special_tokens if token.get("special") else backend.add_tokens)([made])
    return lacking


def _bytes_by_id(vocab: dict[str, int], added: list[dict[str, Any]], path: Path) -> list[bytes]:
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    added_bytes = {token["id"]: token["content"].encode() for token in added}
    table = [b""] * (max([*vocab.values(), *added_bytes]) + 1)
    for token, token_id in vocab.items():
        if token_id not in added_bytes:
            try:
                table[token_id] = bytes(map(byte_of.__getitem__, token))
            except KeyError as error:
                raise CheckpointError(f"{path}: token {quoted(token)} is not made of bytes; {_KIND}") from error
    lost = sorted({bytes([byte]) for byte in byte_of.values()}.difference(table))
    if lost:  # `tokenizers` silently drops such bytes of a text
        raise CheckpointError(f"{path}: has no token for byte 0x{lost[0].hex()}; {_KIND}")
    for token_id, content in added_bytes.items():
        table[token_id] = content
    return table

"""The text of a stream of tokens, as far as it is complete."""

import codecs
from collections.abc import Iterable

from checkpoint.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Decodes one stream of tokens piece by piece; each token costs the same, however long the stream.

    All pieces together are `tokenizer.decode` of all tokens, however the stream is cut: a character whose bytes are
    spread over tokens waits for its last one, and bytes that are no valid UTF-8 become the same U+FFFDs.

    skip_special: leave out special tokens, since a chat's text must not end in `<|eot|>`; else their names appear.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete; may be empty."""
        return self._decoder.decode(self._tokenizer.decode_bytes(token_ids, skip_special=self._skip_special))

    @property
    def amid_character(self) -> bool:
        """The last token ended within a character, whose other bytes must follow."""
        return bool(self._decoder.getstate()[0])

    def finish(self) -> str:
        """The rest, once no token follows: U+FFFD for a character that never ended, else nothing."""
        return self._decoder.decode(b"", final=True)

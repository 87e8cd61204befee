"""The text of a stream of tokens, as far as it is complete."""

import codecs
from collections.abc import Iterable

from checkpoint.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Decodes one stream of tokens piece by piece; each token costs the same, however long the stream.

    All pieces together are `tokenizer.decode` of all tokens, wherever the stream is cut. A
    character whose bytes are spread over tokens comes with the last of them. Bytes that are no
    valid UTF-8 become U+FFFD.

    skip_special: leave special tokens out, so that a chat's text does not end in `<|eot|>`; if
    false, their names appear.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete; may be empty."""
        return self._decoder.decode(self._tokenizer.decode_bytes(token_ids, skip_special=self._skip_special))

    @property
    def amid_character(self) -> bool:
        """Whether the last token ended within a character."""
        return bool(self._decoder.getstate()[0])

    def flush(self) -> str:
        """The rest, once no token follows: U+FFFD if the last character is incomplete, otherwise
        nothing."""
        return self._decoder.decode(b"", final=True)

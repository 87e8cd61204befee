"""A request on its way through the scheduler, and what one step does for it."""

from dataclasses import dataclass

from router.request import GenerationRequest
from router.schedule.block_table import BlockTable, PrefixKeys, TableEntry


@dataclass(eq=False)
class SequenceState:
    """A request on its way.

    number: of its arrival. token_ids: prompt and completion. computed: how many of these are in the KV cache.
    While it runs, it has a row of its own among the block tables, and blocks.
    cached_tokens: prompt tokens that it found in the prefix cache when it was first started.
    awaited: the key of a block that another is computing, and before which it had better not start.
    """

    number: int
    request: GenerationRequest
    token_ids: list[int]
    keys: PrefixKeys
    computed: int = 0
    row: int = -1
    blocks: BlockTable | None = None
    cached_tokens: int | None = None
    awaited: bytes | None = None

    @property
    def generated(self) -> int:
        """Tokens of the completion, whoever has made them."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def is_decoding(self) -> bool:
        # A prompt of one token is no decoding: a stream of these could keep an older, longer prompt waiting for ever.
        return self.generated > 0 and len(self.token_ids) - self.computed == 1


@dataclass(frozen=True)
class Work:
    """Tokens first..first+length-1 of a sequence. samples: the last of them is followed by a new token.

    new_entries: what changed in the sequence's block tables since its last work.
    """

    sequence: SequenceState
    first: int
    length: int
    new_entries: tuple[TableEntry, ...]

    @property
    def samples(self) -> bool:
        return self.first + self.length == len(self.sequence.token_ids)

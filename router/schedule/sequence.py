"""A request inside the scheduler, and its part of one step."""

from dataclasses import dataclass

from router.request import GenerationRequest
from router.schedule.block_table import BlockTable, PrefixKeys, TableEntry


@dataclass(eq=False)
class SequenceState:
    """A request that waits or runs.

    number: order of arrival, from 1.
    token_ids: prompt and completion so far.
    computed: how many of token_ids are in the KV cache.
    table_row: the sequence's row of the KV cache's block tables; -1 while it waits.
    blocks: its KV blocks; None while it waits.
    cached_tokens: prompt tokens found in the prefix cache when it first started; None before.
    awaited: key of a block that another sequence is computing. This one starts once that block is
    published.
    goes_on: another router had it before.
    """

    number: int
    request: GenerationRequest
    token_ids: list[int]
    keys: PrefixKeys
    computed: int = 0
    table_row: int = -1
    blocks: BlockTable | None = None
    cached_tokens: int | None = None
    awaited: bytes | None = None
    goes_on: bool = False

    @property
    def generated(self) -> int:
        """Tokens of the completion, whoever has made them."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def is_decoding(self) -> bool:
        # One-token prompts do not count as decoding: a stream of them could starve an older,
        # longer prompt.
        return self.generated > 0 and len(self.token_ids) - self.computed == 1


@dataclass(frozen=True)
class Work:
    """One sequence's part of a step: compute its tokens first..first+length-1.

    new_entries: changes in the sequence's block tables since its last work.
    """

    sequence: SequenceState
    first: int
    length: int
    new_entries: tuple[TableEntry, ...]

    @property
    def samples(self) -> bool:
        """Whether a new token is sampled after the last of these."""
        return self.first + self.length == len(self.sequence.token_ids)

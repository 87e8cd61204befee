"""How a router reaches one shard. One interface, two transports, chosen once at construction.

LocalLink calls a shard in the same process; GroupLink (experts/group_link.py) crosses processes.

Legend: N rows, D model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from experts.errors import ShardRefused
from experts.shard import ExpertShard


class ExpertRows(NamedTuple):
    """Rows for one shard in one layer, sorted by expert: counts[i] rows of x_ND for experts[i].

    versions: of each expert's weights; a shard that holds another version refuses.
    """

    layer: int
    experts: Sequence[int]
    versions: Sequence[int]
    counts: Sequence[int]
    x_ND: torch.Tensor


class Reply(Protocol):
    """The answer to one request, perhaps still on its way. The link's bell rings when it has come.

    Whoever drops a reply wants it no more.
    """

    @property
    def done(self) -> bool:
        """Whether `take` returns or raises at once: the answer has come, or never will."""
        ...

    @property
    def answered_s(self) -> float | None:
        """When the answer came, by time.monotonic; None if it did not come from elsewhere."""
        ...

    def take(self) -> torch.Tensor:
        """y_ND of a reply that is done, in the order of the request's rows.

        Raises LinkDown, NotHeld or ComputeFailed.
        """
        ...


class Link(Protocol):
    """One router's way to one shard."""

    @property
    def down_reason(self) -> str | None:
        """None while the link works; else why it does not, for messages to users."""
        ...

    @property
    def is_loaded(self) -> bool:
        """Whether the shard holds all that it should. One that still loads answers, but slowly."""
        ...

    def request(self, rows: ExpertRows) -> Reply:
        """Send the rows on their way; the shard computes while the caller goes on. Raises LinkDown."""
        ...

    def close(self) -> None: ...


class LocalLink:
    """A shard in the same process, which computes within `request`.

    The comparison for links between processes.
    """

    down_reason = None
    is_loaded = True

    def __init__(self, shard: ExpertShard) -> None:
        self._shard = shard

    def request(self, rows: ExpertRows) -> Reply:
        try:
            return _Done(self._shard.compute(rows.layer, rows.experts, rows.versions, rows.counts, rows.x_ND))
        except ShardRefused as refusal:
            return _Done(refusal)

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class _Done:
    outcome: torch.Tensor | ShardRefused
    done = True
    answered_s = None

    def take(self) -> torch.Tensor:
        if isinstance(self.outcome, ShardRefused):
            raise self.outcome
        return self.outcome

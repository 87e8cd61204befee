"""How a router reaches one shard. One interface, two transports, chosen once at construction.

LocalLink calls a shard in the same process; GroupLink (experts/group_link.py) crosses processes.

Legend: N rows, D model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

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
    """The answer to one request, perhaps still on its way."""

    def wait(self) -> torch.Tensor:
        """y_ND, in the order of the request's rows. Raises LinkDown, NotHeld or ComputeFailed."""
        ...


class Link(Protocol):
    """One router's way to one shard."""

    @property
    def down_reason(self) -> str | None:
        """None while the link works; else why it does not, for messages to users."""
        ...

    def request(self, rows: ExpertRows) -> Reply:
        """Send the rows on their way; the shard computes while the caller goes on.

        Raises LinkDown; and NotHeld at once where the shard is asked within the process.
        """
        ...

    def close(self) -> None: ...


class LocalLink:
    """A shard in the same process, which computes within `request`.

    The comparison for links between processes.
    """

    down_reason = None

    def __init__(self, shard: ExpertShard) -> None:
        self._shard = shard

    def request(self, rows: ExpertRows) -> Reply:
        y_ND = self._shard.compute(rows.layer, rows.experts, rows.versions, rows.counts, rows.x_ND)
        return _Done(y_ND)

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class _Done:
    y_ND: torch.Tensor

    def wait(self) -> torch.Tensor:
        return self.y_ND

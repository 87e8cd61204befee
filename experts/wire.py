"""The messages on a link, and their bytes.

    int64[8]            kind, sequence number, layer, groups, rows, text bytes, refusal code, bytes of the whole message
    int32[groups, 3]    for ROWS: expert, version of its weights, number of rows; the space of max_groups is always sent
    row_bytes * rows    the rows, in the model's dtype; or text in UTF-8

Kind by kind, with every field that is not named left 0 or empty:

    HEARTBEAT   nothing
    ROWS        sequence, layer, groups, rows: compute these experts, each at this version of its weights
    RESULT      the request's sequence, and its rows computed, in their order
    REFUSAL     the request's sequence, a code (RefusalCode) and a text for the log:
                  1 NOT_HELD        an expert, or this version of it, is not here; other shards may have it
                  2 COMPUTE_FAILED  the experts are here, but computing failed; it may fail again

A long message travels in pieces (experts/pieces.py); all but the first are of kind CONTINUATION.

Legend: N rows, D model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch

from experts.errors import RefusalCode

_HEADER_INTS = 8
HEADER_BYTES = 8 * _HEADER_INTS
_GROUP_INTS = 3  # expert, version, rows
_MAX_GROUP_INT = 2**31 - 1
_ALIGN = 64  # bytes, so that rows start on a cache line


class Kind(IntEnum):
    """HEARTBEAT: I am alive. ROWS: compute these. RESULT: computed. REFUSAL: cannot, and why.

    CONTINUATION: a further piece of a message.
    """

    HEARTBEAT = 1
    ROWS = 2
    RESULT = 3
    REFUSAL = 4
    CONTINUATION = 5


@dataclass(frozen=True)
class Message:
    """One message. sequence: a reply carries that of its request.

    experts, versions, counts: of the groups of rows, one entry each. code: of a refusal, and only
    there.
    """

    kind: Kind
    sequence: int = 0
    layer: int = 0
    experts: Sequence[int] = ()
    versions: Sequence[int] = ()
    counts: Sequence[int] = ()
    x_ND: torch.Tensor | None = None
    text: str = ""
    code: RefusalCode | None = None


@dataclass(frozen=True)
class WireFormat:
    """What both ends of a link must agree on.

    max_rows: rows in one message; max_groups: experts in one message.

    rows_inline: rows are part of the message; otherwise it only tells how many travel beside it,
    in a RowChannel.
    """

    max_groups: int
    max_rows: int
    hidden_size: int
    dtype: torch.dtype
    rows_inline: bool = True

    @property
    def rows_offset(self) -> int:
        raw = HEADER_BYTES + 4 * _GROUP_INTS * self.max_groups
        return -(-raw // _ALIGN) * _ALIGN

    @property
    def row_bytes(self) -> int:
        return self.hidden_size * self.dtype.itemsize

    @property
    def capacity(self) -> int:
        """Bytes of the longest message."""
        return self.rows_offset + self.max_rows * self.row_bytes

    def new_buffer(self) -> torch.Tensor:
        return torch.zeros(self.capacity, dtype=torch.uint8)

    def check(self, message: Message) -> None:
        """Assert that `message` fits: one that does not is a defect of its sender."""
        rows, groups = 0 if message.x_ND is None else len(message.x_ND), len(message.experts)
        assert rows <= self.max_rows, f"{rows} rows for a link of {self.max_rows}"
        assert groups <= self.max_groups, f"{groups} experts for a link of {self.max_groups}"
        for field in ("experts", "versions", "counts") if groups else ():
            low, high = min(getattr(message, field)), max(getattr(message, field))
            assert 0 <= low <= high <= _MAX_GROUP_INT, f"{field} from {low} to {high}; the wire carries int32, from 0"

    def pack(self, message: Message, buffer: torch.Tensor) -> torch.Tensor:
        """Write `message`, which `check` has passed, to the front of `buffer`; returns that front, ready to send."""
        x_ND, groups = message.x_ND, len(message.experts)
        rows = 0 if x_ND is None else len(x_ND)
        text = message.text.encode(errors="replace")[: self.max_rows * self.row_bytes]
        end = self.rows_offset
        if x_ND is not None and self.rows_inline:
            end += rows * self.row_bytes
        elif text:
            end += len(text)
        array = buffer.numpy()
        header = (message.kind, message.sequence, message.layer, groups, rows, len(text), message.code or 0, end)
        array[:HEADER_BYTES].view(np.int64)[:] = header
        if groups:
            of_groups = _groups(array, groups)
            of_groups[:, 0] = message.experts
            of_groups[:, 1] = message.versions
            of_groups[:, 2] = message.counts
        if x_ND is not None and self.rows_inline:
            buffer[self.rows_offset : end].view(self.dtype).view(rows, self.hidden_size).copy_(x_ND)
        elif text:
            array[self.rows_offset : end] = np.frombuffer(text, dtype=np.uint8)
        return buffer[:end]

    def unpack(self, buffer: torch.Tensor, *, copy: bool = True) -> Message:
        """Read the message at the front of `buffer`. copy: inline rows, so that the buffer may be reused."""
        array = buffer.numpy()
        kind, sequence, layer, groups, rows, text_bytes, code, _ = array[:HEADER_BYTES].view(np.int64).tolist()
        experts, versions, counts = _groups(array, groups).T.tolist()
        x_ND, text = None, ""
        if rows and self.rows_inline:
            end = self.rows_offset + rows * self.row_bytes
            x_ND = buffer[self.rows_offset : end].view(self.dtype).view(rows, self.hidden_size)
            x_ND = x_ND.clone() if copy else x_ND
        elif text_bytes:
            text = array[self.rows_offset : self.rows_offset + text_bytes].tobytes().decode(errors="replace")
        refused = RefusalCode(code) if code else None
        return Message(Kind(kind), sequence, layer, experts, versions, counts, x_ND, text, refused)

    def row_count(self, buffer: torch.Tensor) -> int:
        """How many rows the message at the front of `buffer` has, inline or beside it."""
        return int(buffer[:HEADER_BYTES].view(torch.int64)[4])


def write_header(buffer: torch.Tensor, kind: Kind, total: int) -> None:
    """Make the front of `buffer` (uint8) the header of `total` bytes of this kind, with nothing else in it."""
    buffer.numpy()[:HEADER_BYTES].view(np.int64)[:] = (kind, 0, 0, 0, 0, 0, 0, total)


def message_kind(buffer: torch.Tensor) -> int:
    """The Kind that the header at the front of `buffer` names; any number, if a stranger wrote it."""
    return int(buffer.numpy()[:HEADER_BYTES].view(np.int64)[0])


def message_bytes(buffer: torch.Tensor) -> int:
    """The length that the header at the front of `buffer` names, header included."""
    return int(buffer.numpy()[:HEADER_BYTES].view(np.int64)[7])


def _groups(array: npt.NDArray[np.uint8], groups: int) -> npt.NDArray[np.int32]:
    """The groups' part of a message, as int32[groups, 3]."""
    end = HEADER_BYTES + 4 * _GROUP_INTS * groups
    return array[HEADER_BYTES:end].view(np.int32).reshape(groups, _GROUP_INTS)

"""The messages on a link, and their bytes.

    int64[7]            kind, sequence number, layer, groups, rows, text bytes, refusal code
    int32[groups, 3]    for ROWS: expert, version of its weights, number of rows
    bytes               the rows, in the model's dtype; or text in UTF-8

Kind by kind, with every field that is not named left 0 or empty:

    HEARTBEAT   nothing
    ROWS        sequence, layer, groups, rows: compute these experts, each at this version of its weights
    RESULT      the request's sequence, and its rows computed, in their order
    LOADED      nothing; from a shard, which now holds all that it should
    REFUSAL     the request's sequence, a code (RefusalCode) and a text for the log:
                  1 NOT_HELD        an expert, or this version of it, is not here; other shards may have it
                  2 COMPUTE_FAILED  the experts are here, but computing failed; it may fail again

Legend: N rows, D model width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

from experts.errors import RefusalCode

MAX_TEXT_BYTES = 2**16
_HEADER_INTS = 7
_GROUP_INTS = 3  # expert, version, rows
_MAX_GROUP_INT = 2**31 - 1


class Kind(IntEnum):
    """HEARTBEAT: I am alive. ROWS: compute these. RESULT: computed. REFUSAL: cannot, and why. LOADED: ready."""

    HEARTBEAT = 1
    ROWS = 2
    RESULT = 3
    REFUSAL = 4
    LOADED = 5


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
    def row_bytes(self) -> int:
        return self.hidden_size * self.dtype.itemsize

    def check(self, message: Message) -> None:
        """Assert that `message` fits: one that does not is a defect of its sender."""
        x_ND, groups = message.x_ND, len(message.experts)
        rows = 0 if x_ND is None else len(x_ND)
        assert rows <= self.max_rows, f"{rows} rows for a link of {self.max_rows}"
        assert x_ND is None or (x_ND.shape[1:], x_ND.dtype) == ((self.hidden_size,), self.dtype), f"{x_ND.dtype} rows"
        assert groups <= self.max_groups, f"{groups} experts for a link of {self.max_groups}"
        for field in ("experts", "versions", "counts") if groups else ():
            low, high = min(getattr(message, field)), max(getattr(message, field))
            assert 0 <= low <= high <= _MAX_GROUP_INT, f"{field} from {low} to {high}; the wire carries int32, from 0"

    def pack(self, message: Message) -> list[memoryview]:
        """The bytes of `message`, which `check` has passed, in parts. Its rows are not copied, if they lie in order."""
        x_ND, groups = message.x_ND, len(message.experts)
        rows = 0 if x_ND is None else len(x_ND)
        text = message.text.encode(errors="replace")[:MAX_TEXT_BYTES]
        header = (message.kind, message.sequence, message.layer, groups, rows, len(text), message.code or 0)
        parts = [np.array(header, np.int64).data.cast("B")]
        if groups:
            of_groups = np.array([message.experts, message.versions, message.counts], np.int32).T
            parts.append(np.ascontiguousarray(of_groups).data.cast("B"))
        if rows and self.rows_inline:
            assert x_ND is not None
            parts.append(bytes_of(x_ND.contiguous()))
        return [*parts, memoryview(text)]

    def read(self, fill: Callable[[memoryview], None]) -> tuple[Message, int]:
        """The next message, and its number of rows, inline or beside it. Raises ValueError if it is none.

        fill: fills memory with the bytes that come next. What the message has is its own.
        """
        numbers = np.empty(_HEADER_INTS, np.int64)
        fill(numbers.data.cast("B"))
        kind, sequence, layer, groups, rows, text_bytes, code = numbers.tolist()
        for field, number, most in (
            ("experts", groups, self.max_groups),
            ("rows", rows, self.max_rows),
            ("bytes of text", text_bytes, MAX_TEXT_BYTES),
        ):
            if not 0 <= number <= most:
                raise ValueError(f"a message of {number} {field}, on a link of {most}")
        of_groups = np.empty((groups, _GROUP_INTS), np.int32)
        if groups:
            fill(of_groups.data.cast("B"))
        experts, versions, counts = of_groups.T.tolist()
        x_ND = None
        if rows and self.rows_inline:
            x_ND = torch.empty(rows, self.hidden_size, dtype=self.dtype)
            fill(bytes_of(x_ND))
        text = bytearray(text_bytes)
        fill(memoryview(text))
        refused = RefusalCode(code) if code else None
        decoded = text.decode(errors="replace")
        return Message(Kind(kind), sequence, layer, experts, versions, counts, x_ND, decoded, refused), rows


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, as bytes."""
    return tensor.view(-1).view(torch.uint8).numpy().data

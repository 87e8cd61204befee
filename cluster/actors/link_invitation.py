"""What a router tells a shard with which it wants a link."""

from dataclasses import dataclass, field

import torch

from experts.connection import Connection
from experts.endpoint import Liveness
from experts.groups.nccl import Cuda, NcclRows
from experts.groups.row_channel import RowChannel
from experts.wire import WireFormat


@dataclass(frozen=True)
class LinkInvitation:
    """The link's name and secret, and what both ends must agree on. Ray carries it, and keeps strangers out.

    liveness: how the shard judges the router. timeout_s: how long to wait for the other end. Rows
    that are not part of the messages (wire.rows_inline) go over NCCL, whose ends meet at row_store
    (host, port).
    """

    name: str
    secret: bytes = field(repr=False)
    wire: WireFormat
    liveness: Liveness
    timeout_s: float
    row_store: tuple[str, int] | None = None

    def row_channel(self, rank: int, device: torch.device, connection: Connection) -> RowChannel | None:
        """This end's part of what carries the rows beside `connection`, which is closed if that fails.

        None if they are inline. Returns once both ends have joined. Raises ConnectionError.
        """
        if self.wire.rows_inline:
            return None
        assert self.row_store is not None
        try:
            gpu = Cuda(*self.row_store, device, self.timeout_s)
            return NcclRows(gpu, self.name, rank, self.wire.hidden_size, self.wire.dtype, self.timeout_s)
        except ConnectionError:
            connection.close()
            raise

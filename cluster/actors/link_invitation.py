"""What a router tells a shard with which it wants a link."""

from dataclasses import dataclass, field

import ray
import torch

from experts.endpoint import Liveness
from experts.groups.gloo import Exchange, Pair
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

    def accept(self, rank: int, device: torch.device, exchange: Exchange) -> tuple[Pair, RowChannel | None]:
        """Form this process's end; returns once both ends have met. Raises ConnectionError."""
        wire = self.wire
        pair = Pair(self.name, rank, ray.util.get_node_ip_address(), self.secret, exchange, self.timeout_s)
        if wire.rows_inline:
            return pair, None
        assert self.row_store is not None
        host, port = self.row_store
        try:
            gpu = Cuda(host, port, device, self.timeout_s)
            rows = NcclRows(gpu, self.name, rank, wire.hidden_size, wire.dtype, self.timeout_s)
        except ConnectionError:
            pair.close()
            raise
        return pair, rows

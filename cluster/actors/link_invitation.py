"""How the two ends of a link meet: what a router tells a shard, and what both do with it."""

from dataclasses import dataclass

import ray
import torch

from experts.endpoint import Liveness
from experts.groups.gloo import Pair
from experts.groups.nccl import NcclRows
from experts.groups.row_channel import RowChannel
from experts.wire import WireFormat


@dataclass(frozen=True)
class LinkInvitation:
    """The store where the ends meet, the link's name, and what both must agree on.

    liveness: how the shard judges the router. timeout_s: how long to wait for the other end. Rows
    that are not part of the messages (wire.rows_inline) go over NCCL.
    """

    store_host: str
    store_port: int
    name: str
    wire: WireFormat
    liveness: Liveness
    timeout_s: float

    def accept(self, rank: int, device: torch.device) -> tuple[Pair, RowChannel | None]:
        """Form this process's end; returns once both ends have met. Raises ConnectionError."""
        wire, store = self.wire, (self.store_host, self.store_port, self.name, rank)
        pair = Pair(*store, ray.util.get_node_ip_address(), self.timeout_s)
        if wire.rows_inline:
            return pair, None
        try:
            return pair, NcclRows(*store, device, wire.max_rows, wire.hidden_size, wire.dtype, self.timeout_s)
        except ConnectionError:
            pair.close()
            raise

"""Rows that travel beside their message, as between GPUs; here a second pair through host memory carries them.

Shows the endpoints' part (header first, receive after it, sizes from it, deadlines). NCCL itself needs a GPU.
"""

import threading
from dataclasses import replace

import pytest
import torch

from checkpoint.tensors import Checkpoint
from experts.endpoint import Endpoint, Liveness
from experts.errors import LinkDown
from experts.group_link import GroupLink
from experts.groups.gloo import Pair
from experts.link import ExpertRows
from experts.placement import even_placement
from experts.shard import load_shard
from experts.shard_server import ShardServer
from experts.wire import Kind, Message, WireFormat
from tests.experts.ends import join_both
from tests.experts.shard_process import CPU, KERNELS, LIVENESS, rows_like, wire_for
from tests.reference import make_reference


class HostRows:
    """A RowChannel over a Pair of its own."""

    def __init__(self, pair: Pair, wire: WireFormat) -> None:
        self._pair, self._wire = pair, wire

    def send(self, x_ND: torch.Tensor) -> None:
        self._pair.send(x_ND.contiguous().view(-1).view(torch.uint8), 5.0)

    def receive(self, rows: int, timeout_s: float) -> torch.Tensor:
        buffer = torch.empty(rows * self._wire.row_bytes, dtype=torch.uint8)
        self._pair.post_receive(buffer).wait(timeout_s)
        return buffer.view(self._wire.dtype).view(rows, self._wire.hidden_size)

    def close(self) -> None:
        self._pair.close()


def test_rows_beside_the_message_are_computed_like_rows_inside(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = make_reference(tmp_path_factory.mktemp("maverick"), "maverick-4-experts").directory
    checkpoint = Checkpoint.open(directory)
    placement = even_placement(checkpoint.config.moe_layers, 4, 1)
    shard = load_shard(checkpoint, placement.slots_of(0), KERNELS)
    wire = replace(wire_for(checkpoint), rows_inline=False)
    pairs, row_pairs = join_both("beside"), join_both("beside-rows")
    server = ShardServer(shard, CPU)
    server.serve(pairs[1], wire, LIVENESS, "beside", HostRows(row_pairs[1], wire))
    link = GroupLink(pairs[0], wire, LIVENESS, 10.0, CPU, "beside", HostRows(row_pairs[0], wire))
    for count in (1, 7, 30):
        x_ND = rows_like([0, 2], [count, 2], checkpoint.config.hidden_size, seed=count)
        reply = link.request(ExpertRows(1, [0, 2], [1, 1], [count, 2], x_ND))
        assert torch.equal(reply.wait(), shard.compute(1, [0, 2], [1, 1], [count, 2], x_ND))
    link.close()
    server.close()


def test_rows_that_were_announced_and_do_not_come_end_the_link() -> None:
    wire = WireFormat(max_groups=4, max_rows=8, hidden_size=16, dtype=torch.float32, rows_inline=False)
    pairs, row_pairs = join_both("missing"), join_both("missing-rows")
    down = threading.Event()
    endpoint = Endpoint(
        pairs[0], wire, Liveness(0.05, 0.5), lambda message: None, lambda reason: down.set(), "missing",
        HostRows(row_pairs[0], wire),
    )  # fmt: skip
    receive = pairs[1].post_receive(wire.new_buffer())
    receive.wait(60.0)  # the endpoint's first heartbeat: it is listening
    announced = Message(Kind.RESULT, 1, x_ND=torch.zeros(3, 16))
    pairs[1].send(wire.pack(announced, wire.new_buffer()), 60.0)
    assert down.wait(60.0)
    with pytest.raises(LinkDown):
        endpoint.post(Message(Kind.HEARTBEAT))
    endpoint.close()

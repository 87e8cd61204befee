"""Rows that travel beside their message, as between GPUs; here a second connection carries them.

Shows the endpoints' part: header first, receive after it, sizes from it, deadlines.
"""

import queue
import threading
from dataclasses import replace

import pytest
import torch

from checkpoint.tensors import Checkpoint
from experts.bell import ThreadBell
from experts.connection import Connection
from experts.endpoint import Endpoint, Liveness
from experts.errors import LinkDown
from experts.group_link import GroupLink
from experts.link import ExpertRows
from experts.placement import even_placement
from experts.shard import load_shard
from experts.shard_server import ShardServer
from experts.wire import Kind, Message, WireFormat, bytes_of
from tests.experts.ends import join_both, taken
from tests.experts.shard_process import CPU, KERNELS, LIVENESS, rows_like, wire_for
from tests.processes import PATIENCE_S
from tests.reference import make_reference

IMPATIENT = Liveness(heartbeat_s=0.05, silence_s=0.5)
ASKED = ExpertRows(1, [0], [1], [3], torch.ones(3, 16))
ANSWER = torch.arange(48.0).view(3, 16)


class HostRows:
    """A RowChannel over a connection of its own."""

    def __init__(self, connection: Connection, wire: WireFormat) -> None:
        self._connection, self._wire = connection, wire
        connection.allow_silence(PATIENCE_S)

    def send(self, x_ND: torch.Tensor) -> None:
        self._connection.send([bytes_of(x_ND.contiguous())])

    def receive(self, rows: int) -> torch.Tensor:
        x_ND = torch.empty(rows, self._wire.hidden_size, dtype=self._wire.dtype)
        self._connection.read(bytes_of(x_ND))
        return x_ND

    def close(self) -> None:
        self._connection.close()


def test_rows_beside_the_message_are_computed_like_rows_inside(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = make_reference(tmp_path_factory.mktemp("maverick"), "maverick-4-experts").directory
    checkpoint = Checkpoint.open(directory)
    placement = even_placement(checkpoint.config.moe_layers, 4, 1)
    shard = load_shard(checkpoint, placement.slots_of(0), KERNELS)
    wire = replace(wire_for(checkpoint), rows_inline=False)
    pairs, row_pairs = join_both(), join_both()
    server = ShardServer(shard, CPU)
    server.serve(pairs[1], wire, LIVENESS, "beside", HostRows(row_pairs[1], wire))
    link = GroupLink(pairs[0], wire, LIVENESS, ThreadBell(), CPU, "beside", HostRows(row_pairs[0], wire))
    for count in (1, 7, 30):
        x_ND = rows_like([0, 2], [count, 2], checkpoint.config.hidden_size, seed=count)
        reply = link.request(ExpertRows(1, [0, 2], [1, 1], [count, 2], x_ND))
        assert torch.equal(taken(reply), shard.compute(1, [0, 2], [1, 1], [count, 2], x_ND))
    link.close()
    server.close()


class LateRows(HostRows):
    """Its rows leave only once `may_leave` is set; `send` does not wait for that, as on a GPU."""

    def __init__(self, connection: Connection, wire: WireFormat) -> None:
        super().__init__(connection, wire)
        self.may_leave = threading.Event()

    def send(self, x_ND: torch.Tensor) -> None:
        def send_later() -> None:
            if self.may_leave.wait(PATIENCE_S):
                super(LateRows, self).send(x_ND)

        threading.Thread(target=send_later, daemon=True).start()


def late_link(name: str) -> tuple[GroupLink, Endpoint, LateRows, "queue.SimpleQueue[Message]"]:
    """A router's link, its shard's endpoint, the shard's row channel, and the messages that the shard got."""
    wire = WireFormat(max_groups=4, max_rows=8, hidden_size=16, dtype=torch.float32, rows_inline=False)
    pairs, row_pairs = join_both(), join_both()
    got: queue.SimpleQueue[Message] = queue.SimpleQueue()
    rows = LateRows(row_pairs[1], wire)
    shard = Endpoint(pairs[1], wire, IMPATIENT, got.put, lambda reason: None, name, rows)
    link = GroupLink(pairs[0], wire, IMPATIENT, ThreadBell(), CPU, name, HostRows(row_pairs[0], wire))
    return link, shard, rows, got


def test_rows_that_come_late_are_slowness_and_not_death() -> None:
    link, shard, rows, got = late_link("late")
    first = link.request(ASKED)
    shard.post(Message(Kind.RESULT, got.get(timeout=PATIENCE_S).sequence, x_ND=ANSWER))
    never_set = threading.Event()
    assert not never_set.wait(5 * IMPATIENT.silence_s)  # many times the silence that would be death
    assert (link.down_reason, first.done) == (None, False)
    del first  # given up
    rows.may_leave.set()
    second = link.request(ASKED)
    shard.post(Message(Kind.RESULT, got.get(timeout=PATIENCE_S).sequence, x_ND=ANSWER + 1))
    assert torch.equal(taken(second), ANSWER + 1), "the late rows came first, and were nobody's"
    link.close()
    shard.close()


def test_a_link_that_ends_while_rows_are_awaited_frees_every_waiter() -> None:
    link, shard, _, got = late_link("ended")
    reply = link.request(ASKED)
    shard.post(Message(Kind.RESULT, got.get(timeout=PATIENCE_S).sequence, x_ND=ANSWER))
    shard.close()
    with pytest.raises(LinkDown, match="lost"):
        taken(reply)
    link.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.endswith(" ended")]

"""Every thread of a shard is supervised: one that cannot compute does not look alive."""

import threading
from typing import Any

import pytest
import torch

from experts.endpoint import Liveness
from experts.errors import LinkDown
from experts.group_link import GroupLink
from experts.link import ExpertRows
from experts.process_group import LinkStore
from experts.shard import ExpertShard
from experts.shard_server import ShardServer
from experts.slots import Slots
from experts.wire import WireFormat
from kernels.choose import choose_kernels
from tests.experts.test_process_group import join_both
from tests.processes import PATIENCE_S

CPU = torch.device("cpu")
KERNELS = choose_kernels(CPU, torch.float32, 1)
LIVENESS = Liveness(heartbeat_s=0.1, silence_s=PATIENCE_S)
WIRE = WireFormat(max_groups=2, max_rows=4, hidden_size=8, dtype=torch.float32)


class OverflowingShard(ExpertShard):
    """Answers with more rows than a message takes, which ends the computing thread."""

    def compute(self, *args: Any) -> torch.Tensor:
        return torch.zeros(WIRE.max_rows + 1, WIRE.hidden_size)


def test_when_the_computing_thread_ends_all_links_end_and_the_process_hears_of_it() -> None:
    crashed = threading.Event()
    server = ShardServer(OverflowingShard(Slots(), KERNELS), CPU, on_crash=crashed.set)
    links = []
    for name in ("asking", "idle"):
        router_end, shard_end = join_both(LinkStore("127.0.0.1"), name)
        server.serve(shard_end, WIRE, LIVENESS, name)
        links.append(GroupLink(router_end, WIRE, LIVENESS, PATIENCE_S, CPU, name))
    with pytest.raises(LinkDown, match="lost"):
        links[0].request(ExpertRows(1, [0], [1], [1], torch.zeros(1, 8))).wait()
    assert crashed.wait(PATIENCE_S)
    assert links[1].wait_until_down().startswith("lost")
    for link in links:
        link.close()
    server.close()
    assert server.link_names == ()

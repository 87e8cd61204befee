"""Every thread of a shard is supervised: one that cannot compute does not look alive."""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from experts.bell import ThreadBell
from experts.endpoint import Endpoint, Liveness
from experts.errors import LinkDown, RefusalCode
from experts.group_link import GroupLink
from experts.link import ExpertRows, Reply
from experts.shard import ExpertShard
from experts.shard_server import ShardServer
from experts.slots import Slots
from experts.wire import Kind, Message, WireFormat
from kernels.choose import choose_kernels
from tests.experts.ends import SlowPath, join_both, taken
from tests.processes import PATIENCE_S, wait_until

CPU = torch.device("cpu")
KERNELS = choose_kernels(CPU, torch.float32, 1)
LIVENESS = Liveness(heartbeat_s=0.1, silence_s=PATIENCE_S)
WIRE = WireFormat(max_groups=2, max_rows=4, hidden_size=8, dtype=torch.float32)


class OverflowingShard(ExpertShard):
    """Answers with more rows than a message takes, which ends the computing thread."""

    def compute(self, *args: Any) -> torch.Tensor:
        return torch.zeros(WIRE.max_rows + 1, WIRE.hidden_size)


class EchoingShard(ExpertShard):
    """Answers with the rows that it got."""

    def compute(
        self, layer: int, experts: Sequence[int], versions: Sequence[int], counts: Sequence[int], x_ND: torch.Tensor
    ) -> torch.Tensor:
        return x_ND


BAD_MESSAGES = {
    "no rows": (Message(Kind.ROWS, 1, 1, [0], [1], [0]), "got ROWS with 0 rows"),
    "an answer": (Message(Kind.RESULT, 1, x_ND=torch.zeros(2, 8)), "got RESULT with 2 rows"),
}


@pytest.mark.parametrize(("message", "fault"), BAD_MESSAGES.values(), ids=BAD_MESSAGES)
def test_a_message_that_makes_no_sense_is_refused_and_costs_nobody_else(message: Message, fault: str) -> None:
    server = ShardServer(EchoingShard(Slots(), KERNELS), CPU)
    (bad_end, bad_shard_end), (good_end, good_shard_end) = (join_both(), join_both())
    server.serve(bad_shard_end, WIRE, LIVENESS, "bad")
    server.serve(good_shard_end, WIRE, LIVENESS, "good")
    answers: queue.SimpleQueue[Message] = queue.SimpleQueue()
    bad = Endpoint(bad_end, WIRE, LIVENESS, answers.put, lambda reason: None, "bad")
    good = GroupLink(good_end, WIRE, LIVENESS, ThreadBell(), CPU, "good")
    bad.post(message)
    x_ND = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(taken(good.request(ExpertRows(1, [0], [1], [2], x_ND))), x_ND)
    assert answers.get(timeout=PATIENCE_S).kind is Kind.LOADED
    answer = answers.get(timeout=PATIENCE_S)
    assert (answer.kind, answer.sequence, answer.code) == (Kind.REFUSAL, 1, RefusalCode.COMPUTE_FAILED)
    assert fault in answer.text
    bad.close()
    good.close()
    server.close()


def test_when_the_computing_thread_ends_all_links_end_and_the_process_hears_of_it() -> None:
    crashed = threading.Event()
    server = ShardServer(OverflowingShard(Slots(), KERNELS), CPU, on_crash=crashed.set)
    links = []
    for name in ("asking", "idle"):
        router_end, shard_end = join_both()
        server.serve(shard_end, WIRE, LIVENESS, name)
        links.append(GroupLink(router_end, WIRE, LIVENESS, ThreadBell(), CPU, name))
    with pytest.raises(LinkDown, match="lost"):
        taken(links[0].request(ExpertRows(1, [0], [1], [1], torch.zeros(1, 8))))
    assert crashed.wait(PATIENCE_S)
    assert links[1].wait_until_down().startswith("lost")
    for link in links:
        link.close()
    server.close()
    assert server.link_names == ()


@contextmanager
def slow_link(liveness: Liveness) -> Iterator[tuple[GroupLink, SlowPath]]:
    """A link to an echoing shard, over a path on which SLOW_ROWS take two seconds each way."""
    wire = WireFormat(max_groups=2, max_rows=len(SLOW_ROWS), hidden_size=SLOW_ROWS.shape[1], dtype=torch.float32)
    server = ShardServer(EchoingShard(Slots(), KERNELS), CPU)
    with SlowPath(bytes_per_s=SLOW_ROWS.nbytes / 2) as path:
        router_end, shard_end = join_both(path)
        server.serve(shard_end, wire, liveness, "slow")
        link = GroupLink(router_end, wire, liveness, ThreadBell(), CPU, "slow")
        yield link, path
        link.close()
    server.close()


SLOW_ROWS = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(1))


def asked(x_ND: torch.Tensor) -> ExpertRows:
    return ExpertRows(1, [0], [1], [len(x_ND)], x_ND)


def test_a_slow_path_is_not_death() -> None:
    """Each message takes twice as long as a silence may last."""
    patience = Liveness(heartbeat_s=0.1, silence_s=1.0)
    with slow_link(patience) as (link, path):
        began_s = time.monotonic()
        assert torch.equal(taken(link.request(asked(SLOW_ROWS))), SLOW_ROWS)
        assert time.monotonic() - began_s > 2 * patience.silence_s
        assert path.carried > 2 * SLOW_ROWS.nbytes
        assert link.down_reason is None


def test_rows_that_nobody_waits_for_any_more_are_not_sent() -> None:
    """Else each step that was given up on a slow path would lengthen the next, without end."""
    with slow_link(LIVENESS) as (link, path):
        for _ in range(5):
            link.request(asked(SLOW_ROWS))  # its reply is dropped at once
        assert torch.equal(taken(link.request(asked(SLOW_ROWS[:1]))), SLOW_ROWS[:1])
        assert path.carried < 3 * SLOW_ROWS.nbytes, "one may have been under way, there and back"


class HeldShard(EchoingShard):
    """Waits in its first computation until `go` is set."""

    def __init__(self) -> None:
        super().__init__(Slots(), KERNELS)
        self.began, self.go = threading.Event(), threading.Event()
        self.computed: list[float] = []

    def compute(
        self, layer: int, experts: Sequence[int], versions: Sequence[int], counts: Sequence[int], x_ND: torch.Tensor
    ) -> torch.Tensor:
        self.began.set()
        assert self.go.wait(PATIENCE_S)
        self.computed.append(float(x_ND[0, 0]))
        return x_ND


def test_requests_of_a_router_that_is_gone_are_not_computed() -> None:
    shard = HeldShard()
    server = ShardServer(shard, CPU)
    (gone_end, gone_shard_end), (good_end, good_shard_end) = (join_both(), join_both())
    server.serve(gone_shard_end, WIRE, LIVENESS, "gone")
    server.serve(good_shard_end, WIRE, LIVENESS, "good")
    gone = GroupLink(gone_end, WIRE, LIVENESS, ThreadBell(), CPU, "gone")
    good = GroupLink(good_end, WIRE, LIVENESS, ThreadBell(), CPU, "good")
    replies = [gone.request(asked(torch.full((1, 8), 0.0)))]
    assert shard.began.wait(PATIENCE_S)
    replies += [gone.request(asked(torch.full((1, 8), float(n)))) for n in (1, 2)]
    wait_until(lambda: server._requests.qsize() == len(replies) - 1)
    gone.close()
    wait_until(lambda: server.link_names == ("good",))
    shard.go.set()
    assert torch.equal(taken(good.request(asked(torch.full((1, 8), 9.0)))), torch.full((1, 8), 9.0))
    assert shard.computed == [0.0, 9.0]
    good.close()
    server.close()


def test_a_router_that_takes_nothing_keeps_no_other_waiting() -> None:
    server = ShardServer(EchoingShard(Slots(), KERNELS), CPU)
    (frozen_end, frozen_shard_end), (good_end, good_shard_end) = (join_both(), join_both())
    wire = replace(WIRE, hidden_size=2**20)  # more than the system takes from a sender whose peer takes nothing
    server.serve(frozen_shard_end, wire, LIVENESS, "frozen")
    server.serve(good_shard_end, WIRE, LIVENESS, "good")
    good = GroupLink(good_end, WIRE, LIVENESS, ThreadBell(), CPU, "good")
    x_ND = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    for sequence in range(3):
        request = Message(Kind.ROWS, sequence, 1, [0], [1], [4], torch.zeros(4, wire.hidden_size))
        frozen_end.send(wire.pack(request))  # it never reads
    for _ in range(3):
        assert torch.equal(taken(good.request(ExpertRows(1, [0], [1], [2], x_ND))), x_ND)
    assert set(server.link_names) == {"frozen", "good"}
    frozen_end.close()
    good.close()
    server.close()


def test_a_link_whose_sending_thread_ends_is_down_at_both_ends() -> None:
    router_end, shard_end = join_both()
    downs: queue.SimpleQueue[str] = queue.SimpleQueue()
    ends = [Endpoint(end, WIRE, LIVENESS, lambda message: None, downs.put, "defect") for end in (router_end, shard_end)]
    ends[0].post(Message(Kind.REFUSAL, 1, text=None))  # type: ignore[arg-type]  # which no message can carry
    reasons = {downs.get(timeout=PATIENCE_S) for _ in ends}
    assert any(reason.startswith("broke") for reason in reasons)
    for end in ends:
        assert end.down_reason is not None
        end.close()


class CountingShard(HeldShard):
    """Remembers how many rows each computation had; the one of layer 9 fails if it has several requests' rows."""

    def compute(
        self, layer: int, experts: Sequence[int], versions: Sequence[int], counts: Sequence[int], x_ND: torch.Tensor
    ) -> torch.Tensor:
        y_ND = super().compute(layer, experts, versions, counts, x_ND)
        if layer == 9 and len(x_ND) > 1:
            raise MemoryError("too many")
        return y_ND


@pytest.mark.parametrize(("layer", "computed"), [(3, [0.0, 1.0]), (9, [0.0, 1.0, 1.0, 2.0, 3.0])])
def test_what_waits_for_one_layer_is_computed_in_one_go_or_apart_if_that_fails(
    layer: int, computed: list[float]
) -> None:
    shard = CountingShard()
    server = ShardServer(shard, CPU)
    links = []
    for name in ("a", "b"):
        router_end, shard_end = join_both()
        server.serve(shard_end, WIRE, LIVENESS, name)
        links.append(GroupLink(router_end, WIRE, LIVENESS, ThreadBell(), CPU, name))

    def ask(link: GroupLink, value: float) -> Reply:
        return link.request(ExpertRows(layer, [0], [1], [1], torch.full((1, 8), value)))

    replies = [ask(links[0], 0.0)]
    assert shard.began.wait(PATIENCE_S)
    replies.append(ask(links[1], 1.0))
    wait_until(lambda: server._requests.qsize() == 1)
    replies.append(ask(links[0], 2.0))
    wait_until(lambda: server._requests.qsize() == 2)
    replies.append(ask(links[1], 3.0))
    wait_until(lambda: server._requests.qsize() == 3)
    shard.go.set()
    assert [taken(reply)[0, 0].item() for reply in replies] == [0.0, 1.0, 2.0, 3.0]
    assert shard.computed == computed
    for link in links:
        link.close()
    server.close()


def test_a_shard_whose_computation_hangs_ends_itself_and_one_that_idles_does_not() -> None:
    stuck, idle = HeldShard(), HeldShard()
    crashed = {stuck: threading.Event(), idle: threading.Event()}
    servers = [ShardServer(s, CPU, on_crash=crashed[s].set, stuck_after_s=0.2) for s in (stuck, idle)]
    router_end, shard_end = join_both()
    servers[0].serve(shard_end, WIRE, LIVENESS, "stuck")
    link = GroupLink(router_end, WIRE, LIVENESS, ThreadBell(), CPU, "stuck")
    reply = link.request(ExpertRows(1, [0], [1], [1], torch.zeros(1, 8)))
    assert crashed[stuck].wait(PATIENCE_S)
    with pytest.raises(LinkDown, match="lost"):
        taken(reply)
    assert not crashed[idle].is_set()
    stuck.go.set()
    link.close()
    for server in servers:
        server.close()


def test_routers_hear_once_the_shard_has_loaded_whenever_they_came() -> None:
    server = ShardServer(EchoingShard(Slots(), KERNELS), CPU, is_loaded=False)
    heard = [threading.Event(), threading.Event()]
    links = []
    for nth in range(2):
        router_end, shard_end = join_both()
        server.serve(shard_end, WIRE, LIVENESS, str(nth))
        bell = ThreadBell()
        links.append(GroupLink(router_end, WIRE, LIVENESS, bell, CPU, str(nth), on_loaded=heard[nth].set))
        if nth == 0:
            assert taken(links[0].request(ExpertRows(1, [0], [1], [1], torch.zeros(1, 8)))) is not None
            assert not links[0].is_loaded  # it serves before
            server.loaded()
    assert all(each.wait(PATIENCE_S) for each in heard)
    assert all(link.is_loaded for link in links)
    for link in links:
        link.close()
    server.close()


def test_a_shard_prepares_before_it_computes_and_before_it_says_that_it_has_loaded() -> None:
    order: list[str] = []
    may_go = threading.Event()

    def prepare() -> None:
        assert may_go.wait(PATIENCE_S)
        order.append("prepared")

    server = ShardServer(EchoingShard(Slots(), KERNELS), CPU, is_loaded=False, prepare=prepare)
    router_end, shard_end = join_both()
    server.serve(shard_end, WIRE, LIVENESS, "early")
    link = GroupLink(router_end, WIRE, LIVENESS, ThreadBell(), CPU, "early", on_loaded=lambda: order.append("loaded"))
    reply = link.request(ExpertRows(1, [0], [1], [1], torch.zeros(1, 8)))
    telling = threading.Thread(target=server.loaded)
    telling.start()
    wait_until(lambda: server._requests.qsize() == 1)
    assert (reply.done, link.is_loaded, link.down_reason) == (False, False, None)
    may_go.set()
    telling.join(PATIENCE_S)
    assert torch.equal(taken(reply), torch.zeros(1, 8))
    wait_until(lambda: link.is_loaded)
    assert order == ["prepared", "loaded"]
    link.close()
    server.close()

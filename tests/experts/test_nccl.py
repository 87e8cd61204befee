"""Rows between GPUs, over a stand-in with NCCL's rules. The real one needs a GPU."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from experts.bell import ThreadBell
from experts.endpoint import Endpoint, Liveness
from experts.group_link import GroupLink
from experts.groups.nccl import ROUTER_RANK, SHARD_RANK, NcclRows, RowStore, dist
from experts.link import ExpertRows
from experts.wire import Kind, Message, WireFormat
from tests.experts.ends import join_both, taken
from tests.experts.nccl import EAGER_BYTES, FakeGpu, Network
from tests.processes import PATIENCE_S, wait_until

HIDDEN = 16
CPU = torch.device("cpu")
assert 4 * HIDDEN > EAGER_BYTES  # each row needs its receive


def rows_of(count: int, value: float) -> torch.Tensor:
    return torch.full((count, HIDDEN), float(value))


def join(network: Network) -> tuple[NcclRows, NcclRows]:
    """The router's end, the shard's end."""
    with ThreadPoolExecutor() as pool:
        ends = [
            pool.submit(NcclRows, FakeGpu(network), "link", rank, HIDDEN, torch.float32, PATIENCE_S)
            for rank in (ROUTER_RANK, SHARD_RANK)
        ]
        return ends[0].result(PATIENCE_S), ends[1].result(PATIENCE_S)


def test_one_communicator_used_in_two_directions_deadlocks() -> None:
    network = Network()
    gpus = [FakeGpu(network) for _ in range(2)]
    router, shard = (gpu.communicator("one", rank) for rank, gpu in enumerate(gpus))
    rows = [rows_of(2, value) for value in range(4)]
    work = [router.send(rows[:1], 1, 0), shard.send(rows[1:2], 0, 0)]
    work += [router.recv(rows[2:3], 1, 0), shard.recv(rows[3:], 0, 0)]
    assert not any(each.is_done for each in work)
    router.abort()
    assert [each.is_done for each in work] == [True, False, True, False]


def test_rows_under_way_in_both_directions_arrive() -> None:
    router, shard = join(Network())
    router.send(rows_of(3, 1.0))
    shard.send(rows_of(2, 2.0))
    with ThreadPoolExecutor() as pool:
        at_shard, at_router = pool.submit(shard.receive, 3), pool.submit(router.receive, 2)
        try:
            assert torch.equal(at_shard.result(5.0), rows_of(3, 1.0))
            assert torch.equal(at_router.result(5.0), rows_of(2, 2.0))
        finally:
            router.close()
            shard.close()


def test_rows_that_were_received_are_never_overwritten() -> None:
    router, shard = join(Network())
    got = []
    for value in range(5):
        router.send(rows_of(2, value))
        got.append(shard.receive(2))
    assert [rows[0, 0].item() for rows in got] == [0, 1, 2, 3, 4]


def test_rows_live_until_they_have_left_and_no_longer() -> None:
    network = Network()
    router, shard = join(network)
    network.hold()
    sent = [rows_of(2, value) for value in (1.0, 2.0, 3.0)]
    alive = [weakref.ref(rows) for rows in sent]
    while sent:
        router.send(sent.pop(0))
    gc.collect()
    assert all(rows() is not None for rows in alive)
    network.release()
    assert [shard.receive(2)[0, 0].item() for _ in range(3)] == [1.0, 2.0, 3.0]
    router.send(rows_of(1, 4.0))
    gc.collect()
    assert all(rows() is None for rows in alive)


def test_close_frees_a_waiting_receive_aborts_once_and_lets_nothing_be_sent() -> None:
    network = Network()
    router, _ = join(network)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(router.receive, 3)
        wait_until(lambda: any(ends.queues[ROUTER_RANK] for ends in network.ends.values()))
        closers = [pool.submit(router.close) for _ in range(4)]
        with pytest.raises(ConnectionError, match="closed"):
            waiting.result(PATIENCE_S)
        for closer in closers:
            closer.result(PATIENCE_S)
    wait_until(lambda: len(network.aborts) >= 2)
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name == "abort nccl"])
    assert sorted(network.aborts) == [(f"link/rows-from-{sender}", ROUTER_RANK) for sender in (0, 1)]
    with pytest.raises(ConnectionError, match="closed"):
        router.send(rows_of(1, 0.0))
    with pytest.raises(ConnectionError, match="closed"):
        router.receive(1)


def test_an_end_whose_peer_never_joins_gives_up_and_aborts() -> None:
    network = Network()
    with pytest.raises(ConnectionError, match="link lonely could not be formed: 1 rows did not arrive"):
        NcclRows(FakeGpu(network), "lonely", SHARD_RANK, HIDDEN, torch.float32, 0.1)
    wait_until(lambda: network.aborts == [("lonely/rows-from-0", SHARD_RANK)])


def test_what_ended_links_left_in_the_store_is_deleted() -> None:
    store = RowStore("127.0.0.1")
    client = dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False)
    for name in ("link-1/rows-from-0/id", "link-1/rows-from-1/id", "link-11/rows-from-0/id"):
        client.set(name, "somewhere")
    store.forget("link-1")
    assert set(client.list_keys()) == {"link-11/rows-from-0/id"}


def test_a_size_that_was_not_announced_is_an_error() -> None:
    router, shard = join(Network())
    router.send(rows_of(3, 1.0))
    with pytest.raises(ConnectionError, match=r"sent \[3, 16\], received \[2, 16\]"):
        shard.receive(2)


def test_requests_that_cross_answers_on_a_link_are_all_answered() -> None:
    """As after a step that was given up: its answers leave while the next requests are on their way."""
    network = Network()
    ends, (router_pair, shard_pair) = join(network), join_both()
    wire = WireFormat(max_groups=4, max_rows=8, hidden_size=HIDDEN, dtype=torch.float32, rows_inline=False)
    patient = Liveness(0.05, PATIENCE_S)

    def answer(message: Message) -> None:
        assert message.x_ND is not None
        shard.post(Message(Kind.RESULT, message.sequence, x_ND=2 * message.x_ND))

    shard = Endpoint(shard_pair, wire, patient, answer, lambda reason: None, "crossing", ends[SHARD_RANK])
    link = GroupLink(router_pair, wire, patient, ThreadBell(), CPU, "crossing", ends[ROUTER_RANK])
    network.hold()
    replies = [link.request(ExpertRows(1, [0], [1], [3], rows_of(3, value))) for value in range(8)]
    network.release()
    replies += [link.request(ExpertRows(1, [0], [1], [3], rows_of(3, value))) for value in range(8, 20)]
    assert [taken(reply)[0, 0].item() for reply in replies] == [2.0 * value for value in range(20)]
    link.close()
    shard.close()

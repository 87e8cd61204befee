"""What Gloo does, which experts/endpoint.py is built around. If one of these changes, so may the design."""

import subprocess
import sys
import threading
import time

import pytest
import torch

from experts.groups.gloo import ROUTER_RANK, SHARD_RANK, LinkStore, Pair


@pytest.fixture(scope="module")
def store() -> LinkStore:
    return LinkStore("127.0.0.1")


def join_both(store: LinkStore, name: str) -> tuple[Pair, Pair]:
    ends: dict[int, Pair] = {}

    def join(rank: int) -> None:
        ends[rank] = Pair(store.host, store.port, name, rank, "127.0.0.1", 60.0)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in (ROUTER_RANK, SHARD_RANK)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return ends[ROUTER_RANK], ends[SHARD_RANK]


def message(length: int) -> torch.Tensor:
    return torch.arange(length, dtype=torch.uint8)


def test_a_short_message_fills_the_front_of_the_buffer(store: LinkStore) -> None:
    left, right = join_both(store, "short")
    buffer = torch.full((16,), 99, dtype=torch.uint8)
    receive = right.post_receive(buffer)
    left.send(message(4), 60.0)
    receive.wait(60.0)
    assert buffer.tolist() == [0, 1, 2, 3] + 12 * [99]


def test_a_send_waits_for_the_peers_receive(store: LinkStore) -> None:
    left, right = join_both(store, "unposted")
    with pytest.raises(ConnectionError, match="imed out"):
        left.send(message(1 << 7), 0.2)
    right.close()


def test_a_missed_wait_closes_the_pair_and_wakes_both_ends(store: LinkStore) -> None:
    left, right = join_both(store, "missed")
    woken = []

    def receive_long(end: Pair) -> None:
        with pytest.raises(ConnectionError):
            end.post_receive(torch.empty(8, dtype=torch.uint8)).wait(60.0)
        woken.append(end)

    threads = [threading.Thread(target=receive_long, args=(end,)) for end in (left, right)]
    for thread in threads:
        thread.start()
    left.close()
    for thread in threads:
        thread.join(60)
    assert set(woken) == {left, right}
    with pytest.raises(ConnectionError):
        left.send(message(4), 1.0)


def test_joining_an_absent_peer_ends_at_the_timeout(store: LinkStore) -> None:
    began = time.monotonic()
    with pytest.raises(ConnectionError, match="link alone could not be formed"):
        Pair(store.host, store.port, "alone", ROUTER_RANK, "127.0.0.1", 1.0)
    assert time.monotonic() - began < 15.0


OVERSIZED = """
import sys, torch
from experts.groups.gloo import SHARD_RANK, Pair
pair = Pair("127.0.0.1", int(sys.argv[1]), "oversized", SHARD_RANK, "127.0.0.1", 60.0)
receive = pair.post_receive(torch.empty(8, dtype=torch.uint8))
print("posted", flush=True)
try:
    receive.wait(60.0)
except ConnectionError:
    pass
print("survived", flush=True)
"""


def test_an_oversized_message_aborts_the_receiving_process(store: LinkStore) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OVERSIZED, str(store.port)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        pair = Pair(store.host, store.port, "oversized", ROUTER_RANK, "127.0.0.1", 60.0)
        assert process.stdout is not None
        assert process.stdout.readline() == "posted\n"
        try:
            pair.send(message(64), 60.0)
        except ConnectionError:
            pass
        assert process.wait(60) != 0
        assert "survived" not in process.stdout.read()

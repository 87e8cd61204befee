"""What Gloo does, which experts/endpoint.py is built around. If one of these changes, so may the design."""

import datetime
import gc
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from experts.groups.gloo import DATA_TAG, ROUTER_RANK, SHARD_RANK, Exchange, Pair, _Meeting, dist
from tests.experts.ends import HOST, HOST_IN_PROC, SECRET, join_both, listening, meeting, port_in
from tests.processes import PATIENCE_S, wait_until

ROOT = Path(__file__).parents[2]


def message(length: int) -> torch.Tensor:
    return torch.arange(length, dtype=torch.uint8)


def test_a_short_message_fills_the_front_of_the_buffer() -> None:
    left, right = join_both("short")
    buffer = torch.full((16,), 99, dtype=torch.uint8)
    receive = right.post_receive(buffer)
    left.send(message(4), 60.0)
    receive.wait(60.0)
    assert buffer.tolist() == [0, 1, 2, 3] + 12 * [99]


def test_a_send_waits_for_the_peers_receive() -> None:
    left, right = join_both("unposted")
    with pytest.raises(ConnectionError, match="imed out"):
        left.send(message(1 << 7), 0.2)
    right.close()


def test_a_missed_wait_closes_the_pair_and_wakes_both_ends() -> None:
    left, right = join_both("missed")
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


def test_joining_an_absent_peer_ends_at_the_timeout() -> None:
    their_address: list[bytes] = []

    def refuse(mine: bytes) -> bytes:
        their_address.append(mine)
        raise ConnectionError("nobody asked")

    with pytest.raises(ConnectionError, match="link alone could not be formed: nobody asked"):
        Pair("alone", SHARD_RANK, HOST, SECRET, refuse, 1.0)
    began = time.monotonic()
    with pytest.raises(ConnectionError, match="link alone could not be formed"):
        Pair("alone", ROUTER_RANK, HOST, SECRET, lambda mine: their_address[0], 1.0)
    assert time.monotonic() - began < 15.0


OVERSIZED = """
import sys, torch
from experts.groups.gloo import SHARD_RANK, Pair
from tests.experts.ends import HOST, SECRET

def exchange(mine):
    print(mine.hex(), flush=True)
    return bytes.fromhex(sys.stdin.readline())

pair = Pair("oversized", SHARD_RANK, HOST, SECRET, exchange, 60.0)
receive = pair.post_receive(torch.empty(8, dtype=torch.uint8))
print("posted", flush=True)
try:
    receive.wait(60.0)
except ConnectionError:
    pass
print("survived", flush=True)
"""


def test_an_oversized_message_aborts_the_receiving_process() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OVERSIZED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        stdin, theirs = process.stdin, bytes.fromhex(process.stdout.readline())

        def exchange(mine: bytes) -> bytes:
            print(mine.hex(), file=stdin, flush=True)
            return theirs

        pair = Pair("oversized", ROUTER_RANK, HOST, SECRET, exchange, 60.0)
        assert process.stdout.readline() == "posted\n"
        try:
            pair.send(message(64), 60.0)
        except ConnectionError:
            pass
        assert process.wait(60) != 0
        assert "survived" not in process.stdout.read()


# Strangers.


def form(rank: int, exchange: Exchange, secret: bytes = SECRET) -> "Future[Pair]":
    def pair() -> Pair:
        return Pair("guarded", rank, HOST, secret, exchange, 2.0)

    return POOL.submit(pair)


POOL = ThreadPoolExecutor(4)


@pytest.mark.parametrize("impostor", [ROUTER_RANK, SHARD_RANK])
def test_whoever_joins_without_the_secret_is_turned_away_by_both_ends(impostor: int) -> None:
    exchanges = meeting()
    ends = [form(rank, exchanges[rank], b"guessed" if rank == impostor else SECRET) for rank in (0, 1)]
    for end in ends:
        with pytest.raises(ConnectionError, match=r"does not know the link's secret|closed|imed out"):
            end.result(PATIENCE_S)


def test_what_one_end_proves_is_no_proof_of_the_other() -> None:
    """A stranger who says back whatever it hears is no peer."""
    exchanges = meeting()
    guarded = form(ROUTER_RANK, exchanges[ROUTER_RANK])

    def echo() -> None:
        options = dist.ProcessGroupGloo._Options()
        options._timeout = datetime.timedelta(seconds=PATIENCE_S)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=HOST)]
        group = dist.ProcessGroupGloo(_Meeting(exchanges[SHARD_RANK]), SHARD_RANK, 2, options)
        heard = torch.zeros(32, dtype=torch.uint8)
        for _ in range(2):
            group.recv([heard], ROUTER_RANK, DATA_TAG).wait()
            group.send([heard], ROUTER_RANK, DATA_TAG).wait()

    POOL.submit(echo)
    with pytest.raises(ConnectionError, match="does not know the link's secret"):
        guarded.result(PATIENCE_S)


STRANGERS = {
    "takes the place of the peer": b"",
    "and speaks": bytes(range(256)) * 40,
    "and says the most there is": b"\xff" * 100_000,
}


@pytest.mark.parametrize("words", STRANGERS.values(), ids=STRANGERS)
def test_a_stranger_at_the_port_can_at_most_delay_a_link(words: bytes) -> None:
    """Gloo takes the first that connects with the right number; they begin at 0."""
    strangers: list[socket.socket] = []

    def crowd(mine: bytes) -> None:
        at = port_in(mine)
        for number in range(4):
            stranger = socket.create_connection((HOST, int.from_bytes(mine[at : at + 2], "big")))
            stranger.sendall(number.to_bytes(8, "little") + words)
            strangers.append(stranger)

    to_router, to_shard = meeting()
    ends = [
        form(ROUTER_RANK, lambda mine: crowd(mine) or to_router(mine)),  # type: ignore[func-returns-value]
        form(SHARD_RANK, lambda mine: crowd(mine) or to_shard(mine)),  # type: ignore[func-returns-value]
    ]
    for end in ends:
        with pytest.raises(ConnectionError, match="link guarded could not be formed"):
            end.result(PATIENCE_S)
    assert strangers
    left, right = join_both("next")  # on a port of its own, which nobody guessed
    receive = right.post_receive(torch.zeros(4, dtype=torch.uint8))
    left.send(message(4), PATIENCE_S)
    receive.wait(PATIENCE_S)
    for stranger in strangers:
        stranger.close()


def test_a_pair_listens_on_its_one_address_only() -> None:
    before = listening()
    _ends = join_both("listening")
    new = listening() - before
    assert {address for address, _ in new} == {HOST_IN_PROC}
    assert len(new) == 2  # a store where ends meet would be a third


def test_a_link_that_is_gone_leaves_no_port_open() -> None:
    before = len(listening())
    for _ in range(3):
        for end in join_both("short-lived"):
            end.close()
    del end
    wait_until(lambda: gc.collect() >= 0 and len(listening()) <= before)

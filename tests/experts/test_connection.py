"""A connection's ends meet, prove that they were invited, and notice each other's end. Strangers get nothing."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from experts.connection import Connection, Listener, _Candidate, connect
from tests.experts.ends import HOST, HOST_IN_PROC, SECRET, join_both, listening
from tests.processes import PATIENCE_S

POOL = ThreadPoolExecutor(4)
BRIEF_S = 0.5


def received(end: Connection, length: int) -> bytes:
    memory = bytearray(length)
    end.read(memoryview(memory))
    return bytes(memory)


def carries(router: Connection, shard: Connection) -> bool:
    """Bytes in both directions at once, more than the system buffers."""
    words = [os.urandom(3 * 2**22) for _ in range(2)]
    sending = [POOL.submit(end.send, [memoryview(said)]) for end, said in zip((router, shard), words, strict=True)]
    heard = [POOL.submit(received, end, len(words[0])) for end in (shard, router)]
    for sent in sending:
        sent.result(PATIENCE_S)
    return [future.result(PATIENCE_S) for future in heard] == words


def test_bytes_travel_in_both_directions_at_once() -> None:
    assert carries(*join_both())


def test_parts_arrive_as_one_whatever_their_lengths() -> None:
    router, shard = join_both()
    parts = [os.urandom(length) for length in (0, 1, 3 * 2**20, 0, 7)]
    sending = POOL.submit(router.send, [memoryview(part) for part in parts])
    assert received(shard, sum(map(len, parts))) == b"".join(parts)
    sending.result(PATIENCE_S)


def test_a_peer_that_says_nothing_or_takes_nothing_is_silent() -> None:
    router, _shard = join_both()
    router.allow_silence(BRIEF_S)
    with pytest.raises(ConnectionError, match=r"silent for 0\.5 s"):
        received(router, 1)
    with pytest.raises(ConnectionError, match=r"silent for 0\.5 s"):
        router.send([memoryview(bytes(2**26))])


def test_closing_wakes_both_ends() -> None:
    router, shard = join_both()
    waiting = [POOL.submit(received, end, 1) for end in (router, shard)]
    router.close()
    router.close()
    for wait in waiting:
        with pytest.raises(ConnectionError):
            wait.result(PATIENCE_S)
    with pytest.raises(ConnectionError):
        router.send([memoryview(b"x")])


def test_nothing_listens_once_the_ends_have_met() -> None:
    before = listening()
    listener = Listener(HOST)
    assert listening() - before == {(HOST_IN_PROC, listener.address[1])}
    accepted = POOL.submit(listener.accept, SECRET, PATIENCE_S)
    router = connect(listener.address, SECRET, PATIENCE_S)
    shard = accepted.result(PATIENCE_S)
    assert listening() == before
    assert carries(router, shard)


def test_whoever_listens_at_an_address_of_version_six_is_reached_there() -> None:
    listener = Listener("::1")
    accepted = POOL.submit(listener.accept, SECRET, PATIENCE_S)
    assert carries(connect(listener.address, SECRET, PATIENCE_S), accepted.result(PATIENCE_S))


def test_a_router_that_never_comes_is_waited_for_no_longer_than_allowed() -> None:
    before, listener = listening(), Listener(HOST)
    with pytest.raises(ConnectionError, match="nobody came who knows the link's secret"):
        listener.accept(SECRET, BRIEF_S)
    assert listening() == before
    with pytest.raises(ConnectionError, match=f"no connection to {HOST} port {listener.address[1]}: .*refused"):
        connect(listener.address, SECRET, BRIEF_S)


# Strangers.


@pytest.fixture
def guarded() -> Iterator[tuple[Listener, "Future[Connection]"]]:
    """A shard that waits for its router."""
    listener = Listener(HOST)
    accepted = POOL.submit(listener.accept, SECRET, PATIENCE_S)
    yield listener, accepted
    assert accepted.done()


def test_a_router_without_the_secret_is_turned_away_and_the_true_one_is_not(
    guarded: tuple[Listener, "Future[Connection]"],
) -> None:
    listener, accepted = guarded
    with pytest.raises(ConnectionError):
        connect(listener.address, b"guessed", PATIENCE_S)
    assert carries(connect(listener.address, SECRET, PATIENCE_S), accepted.result(PATIENCE_S))


# A header with which Gloo, torch's own way to carry bytes, ends the process that reads it.
GLOO_HEADER = (0).to_bytes(8, "little") + b"".join(number.to_bytes(8, "little") for number in (48 + 64, 1, 0, 0, 64, 0))
STRANGERS = {
    "says nothing": b"",
    "says too little": b"x" * 63,
    "says too much": os.urandom(2**20),
    "says what it hears": None,
    "speaks Gloo": GLOO_HEADER + bytes(64),
}


@pytest.mark.parametrize("words", STRANGERS.values(), ids=STRANGERS)
def test_strangers_neither_end_nor_delay_a_link(
    words: bytes | None, guarded: tuple[Listener, "Future[Connection]"]
) -> None:
    listener, accepted = guarded
    strangers = [socket.create_connection(listener.address) for _ in range(100)]
    for stranger in strangers:
        stranger.settimeout(PATIENCE_S)
        try:
            stranger.sendall(words if words is not None else 2 * stranger.recv(32, socket.MSG_WAITALL))
        except OSError:
            pass  # it has been turned away
    began_s = time.monotonic()
    router = connect(listener.address, SECRET, PATIENCE_S)
    shard = accepted.result(PATIENCE_S)
    assert time.monotonic() - began_s < PATIENCE_S / 2
    assert carries(router, shard)
    for stranger in strangers:  # whoever was still connected is no more
        try:
            while stranger.recv(2**10):
                pass
        except ConnectionError:
            pass
        stranger.close()


def test_a_wake_up_for_nothing_turns_nobody_away() -> None:
    near, far = socket.socketpair()
    candidate = _Candidate(near)
    assert not candidate.has_spoken()
    far.sendall(bytes(64))
    assert candidate.has_spoken()
    near.close()
    far.close()


def test_a_shard_without_the_secret_is_noticed_by_the_router() -> None:
    listener = Listener(HOST)
    POOL.submit(listener.accept, b"guessed", BRIEF_S)
    with pytest.raises(ConnectionError):
        connect(listener.address, SECRET, PATIENCE_S)


@pytest.mark.parametrize("of_router", [False, True], ids=["any proof", "the router's own proof"])
def test_what_the_router_proves_is_no_proof_of_the_shard(of_router: bool) -> None:
    with socket.create_server((HOST, 0)) as server:

        def impostor() -> None:
            with server.accept()[0] as connected:
                connected.sendall(bytes(32))
                heard = connected.recv(64, socket.MSG_WAITALL)
                connected.sendall(heard[32:] if of_router else bytes(32))
                connected.recv(1)

        fooling = threading.Thread(target=impostor)
        fooling.start()
        with pytest.raises(ConnectionError, match="whoever listens does not know the link's secret"):
            connect(server.getsockname(), SECRET, PATIENCE_S)
        fooling.join(PATIENCE_S)

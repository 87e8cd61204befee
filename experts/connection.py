"""A TCP connection between a router and a shard: how its ends meet, and bytes in both directions.

Each (router, shard) pair has a connection of its own. In one world of all ranks, a dead or hung
peer would block everybody. A connection that breaks, opens or closes touches nobody else.

How the ends meet: the shard listens on its node's one address, at a port for this link alone. The
router learns the port over a channel that both trust. Whoever connects must prove that it knows the
link's secret, before any other word of it is read, and the shard proves it in turn. Once they have
met, nothing listens any more. So strangers can neither read, join nor end a link by its ports. What
travels is not encrypted.

torch.distributed's Gloo would carry the same bytes, but it trusts whoever connects. One header from
a stranger makes it end the process. So do too many connections to its port, which stays open.

    shard -> router     its nonce [32]
    router -> shard     its nonce [32], its proof [32]
    shard -> router     its proof [32]

A proof is HMAC-SHA256 of who proves and both nonces. The prover is part of it, so that what one end
says is no proof in the other's mouth.
"""

import hmac
import secrets
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

_NONCE_BYTES = _PROOF_BYTES = 32
_SHARD, _ROUTER = b"shard", b"router"
_Bytes = TypeVar("_Bytes")
# Strangers who are heard out at once. When one more comes, the first must go.
_MAX_CANDIDATES = 64


class PeerSilent(ConnectionError):
    """The peer has sent nothing, or taken nothing, for as long as it may."""


class Connection:
    """One end: bytes in, bytes out, and no wait longer than the peer may be silent.

    One thread may read and another send; `close` comes from any.
    """

    def __init__(self, connected: socket.socket, silence_s: float) -> None:
        """silence_s: see `allow_silence`."""
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connected
        self.allow_silence(silence_s)

    def allow_silence(self, silence_s: float) -> None:
        """From now on, so long may the peer send no byte while one is read for, or take none that is sent."""
        self._socket.settimeout(silence_s)

    def read(self, memory: memoryview) -> None:
        """Fill `memory`, of bytes. Raises ConnectionError."""
        while memory:
            memory = memory[self._do(self._socket.recv_into, memory) :]

    def send(self, parts: Sequence[memoryview]) -> None:
        """Send these bytes, part after part. Raises ConnectionError."""
        left = [part for part in parts if part]
        while left:
            count = self._do(self._socket.sendmsg, left)
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if left:
                left[0] = left[0][count:]

    def close(self) -> None:
        """Close it: every wait at either end fails now. Harmless on a closed one."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the peer was first

    def _do(self, operation: Callable[[_Bytes], int], what: _Bytes) -> int:
        try:
            count = operation(what)
        except TimeoutError:
            raise PeerSilent(f"the peer was silent for {self._socket.gettimeout():g} s") from None
        except OSError as error:
            raise ConnectionError(error.strerror or str(error)) from None
        if count == 0:
            raise ConnectionError("the peer closed it")
        return count


class Listener:
    """Where a shard waits for the router of one link."""

    def __init__(self, host: str) -> None:
        """host: this machine's address, where the router will reach it. Raises OSError."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listening = socket.create_server((host, 0), family=family, backlog=_MAX_CANDIDATES)
        self.address: tuple[str, int] = self._listening.getsockname()[:2]

    def accept(self, secret: bytes, timeout_s: float) -> Connection:
        """The connection of whoever proves to know the secret. Nothing listens afterwards.

        Raises ConnectionError if nobody does within timeout_s.
        """
        deadline_s = time.monotonic() + timeout_s
        candidates: list[_Candidate] = []
        with self._listening, selectors.DefaultSelector() as selector:
            self._listening.setblocking(False)
            selector.register(self._listening, selectors.EVENT_READ)
            try:
                while (left_s := deadline_s - time.monotonic()) > 0:
                    for key, _ in selector.select(left_s):
                        if key.data is None:
                            self._admit(candidates, selector)
                        elif key.data in candidates and key.data.has_spoken():
                            candidates.remove(key.data)
                            selector.unregister(key.data.connected)
                            if (proof := key.data.answer(secret)) is not None:
                                connection = Connection(key.data.connected, timeout_s)
                                connection.send([memoryview(proof)])
                                return connection
                            key.data.connected.close()
            finally:
                for candidate in candidates:
                    candidate.connected.close()
        raise ConnectionError("nobody came who knows the link's secret")

    def _admit(self, candidates: "list[_Candidate]", selector: selectors.BaseSelector) -> None:
        if len(candidates) == _MAX_CANDIDATES:
            first = candidates.pop(0)
            selector.unregister(first.connected)
            first.connected.close()
        try:
            candidate = _Candidate(self._listening.accept()[0])
        except OSError:
            return  # it is gone again, or this process has no descriptor left for it
        candidates.append(candidate)
        selector.register(candidate.connected, selectors.EVENT_READ, candidate)


class _Candidate:
    """Somebody who has connected to a listener, and has proved nothing so far."""

    def __init__(self, connected: socket.socket) -> None:
        """Sends it this end's nonce. Raises OSError."""
        self.connected = connected
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._heard = b""
        try:
            connected.setblocking(False)
            connected.send(self._nonce)
        except OSError:
            connected.close()
            raise

    def has_spoken(self) -> bool:
        """Hear what it has to say now. True once it has said all, or will say no more."""
        try:
            more = self.connected.recv(_NONCE_BYTES + _PROOF_BYTES - len(self._heard))
        except BlockingIOError:  # woken for nothing, which select may do
            return False
        except OSError:
            return True
        self._heard += more
        return not more or len(self._heard) == _NONCE_BYTES + _PROOF_BYTES

    def answer(self, secret: bytes) -> bytes | None:
        """This end's proof, if the candidate has proved to be the router; else None."""
        theirs, proof = self._heard[:_NONCE_BYTES], self._heard[_NONCE_BYTES:]
        if not hmac.compare_digest(proof, _proof(secret, _ROUTER, self._nonce, theirs)):
            return None
        return _proof(secret, _SHARD, self._nonce, theirs)


def connect(address: tuple[str, int], secret: bytes, timeout_s: float) -> Connection:
    """The router's end of a connection to the shard whose listener has `address`.

    Raises ConnectionError if nobody there proves to be the shard, or is silent for timeout_s.
    """
    try:
        connected = socket.create_connection(address, timeout_s)
    except OSError as error:
        raise ConnectionError(f"no connection to {address[0]} port {address[1]}: {error}") from None
    connection = Connection(connected, timeout_s)
    shard_nonce, proof = bytearray(_NONCE_BYTES), bytearray(_PROOF_BYTES)
    mine = secrets.token_bytes(_NONCE_BYTES)
    try:
        connection.read(memoryview(shard_nonce))
        connection.send([memoryview(mine), memoryview(_proof(secret, _ROUTER, bytes(shard_nonce), mine))])
        connection.read(memoryview(proof))
        if not hmac.compare_digest(proof, _proof(secret, _SHARD, bytes(shard_nonce), mine)):
            raise ConnectionError("whoever listens does not know the link's secret")
    except ConnectionError:
        connected.close()
        raise
    return connection


def _proof(secret: bytes, prover: bytes, shard_nonce: bytes, router_nonce: bytes) -> bytes:
    return hmac.digest(secret, prover + shard_nonce + router_nonce, "sha256")

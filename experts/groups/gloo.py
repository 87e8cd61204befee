"""2-rank Gloo groups, which carry bytes through host memory.

Each (router, shard) pair has a group of its own. In one world of all ranks, a dead or hung peer
would block everybody. A pair that breaks, joins or leaves touches nobody else.

How the two ends meet: each listens on its node's one address, and learns the other's address from
`exchange`, which goes over a channel that the caller trusts. Nothing listens for strangers to ask.
Gloo itself trusts whoever connects to such a port with the right number, and the numbers can be
guessed. So each pair has a port of its own, which is expected for milliseconds only, and both ends
prove that they know the link's secret before anything else is believed. The bytes themselves are
not encrypted: torch's builds of Gloo have no TLS.

How Gloo behaves, measured with torch 2.13 and checked by tests/experts/test_gloo.py:

- a send completes only once the peer has posted a matching receive, so two ends that both send
first never finish;
- a message longer than the receive aborts the receiving *process*; a shorter one is taken silently;
- one wait that misses its deadline closes the pair for good, and wakes every other wait on it, at
both ends;
- nothing else wakes a blocked wait, so a missed wait is also how a pair is closed on purpose;
- joining an absent peer blocks until the timeout.
"""

import datetime
import hmac
import secrets
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed

dist: Any = torch.distributed  # torch's stubs leave out most of what this file is about
ROUTER_RANK, SHARD_RANK = 0, 1
DATA_TAG, _UNUSED_TAG = 0, 1
_PROOF_BYTES = 32

Exchange = Callable[[bytes], bytes]
"""exchange(address of this end) -> address of the other end. May raise ConnectionError."""


class Work(Protocol):
    """A send or receive under way."""

    def wait(self, timeout_s: float) -> None:
        """Return when it is done.

        Raises ConnectionError, after which the pair is closed, if that takes too long.
        """
        ...


class Pair:
    """One end of a 2-rank Gloo group: bytes in, bytes out, every wait bounded."""

    def __init__(
        self, name: str, rank: int, bind_host: str, secret: bytes, exchange: Exchange, timeout_s: float
    ) -> None:
        """Join the other rank; blocks until it has joined too, at most about timeout_s.

        name: for messages. bind_host: this machine's address, where the other rank will reach it.
        secret: known to these two ends only. Raises ConnectionError.
        """
        timeout = datetime.timedelta(seconds=timeout_s)
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timeout
        # A device, thus a port and a thread, of the link's own: on a shared port, strangers could take the places of
        # links to come.
        meeting = _Meeting(exchange)
        self._peer = 1 - rank
        try:
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=bind_host)]
            self._group = dist.ProcessGroupGloo(meeting, rank, 2, options)
        except Exception as error:
            reason = first_line(meeting.error or error)
            raise ConnectionError(f"link {name} could not be formed: {reason}") from None
        try:
            self._prove(rank, secret, timeout_s)
        except ConnectionError as error:
            self.close()
            raise ConnectionError(f"link {name} could not be formed: {error}") from None

    def _prove(self, rank: int, secret: bytes, timeout_s: float) -> None:
        """Show the peer that this end knows the secret, and see that it does, too. Raises ConnectionError."""
        mine = secrets.token_bytes(_PROOF_BYTES)
        theirs = self._swap(mine, timeout_s)

        def proof(prover: int) -> bytes:
            # Who proves is part of it: what one end says is no proof in the other's mouth.
            nonces = (mine, theirs) if rank == ROUTER_RANK else (theirs, mine)
            return hmac.digest(secret, bytes([prover]) + b"".join(nonces), "sha256")

        if not hmac.compare_digest(self._swap(proof(rank), timeout_s), proof(self._peer)):
            raise ConnectionError("whoever joined does not know the link's secret")

    def _swap(self, mine: bytes, timeout_s: float) -> bytes:
        theirs = torch.zeros(_PROOF_BYTES, dtype=torch.uint8)
        receive = self.post_receive(theirs)
        self.send(torch.frombuffer(bytearray(mine), dtype=torch.uint8), timeout_s)
        receive.wait(timeout_s)
        return bytes(theirs.tolist())

    def post_receive(self, buffer: torch.Tensor) -> Work:
        """Let the peer's next message fill the front of `buffer` (uint8); it must not be longer
        than the buffer."""
        return _start(lambda: self._group.recv([buffer], self._peer, DATA_TAG))

    def send(self, message: torch.Tensor, timeout_s: float) -> None:
        """Send `message` (uint8) and return once it may be overwritten. Raises ConnectionError."""
        _start(lambda: self._group.send([message], self._peer, DATA_TAG)).wait(timeout_s)

    def close(self) -> None:
        """Close the pair: every wait at either end fails now. Harmless on a closed one."""
        never_sent = torch.empty(1, dtype=torch.uint8)
        try:
            _start(lambda: self._group.recv([never_sent], self._peer, _UNUSED_TAG)).wait(0.001)
        except ConnectionError:
            pass  # the miss is the purpose


class _GlooWork:
    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self, timeout_s: float) -> None:
        try:
            self._work.wait(datetime.timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise ConnectionError(first_line(error)) from None


def _start(operation: Callable[[], Any]) -> _GlooWork:
    try:
        return _GlooWork(operation())
    except RuntimeError as error:
        raise ConnectionError(first_line(error)) from None


class _Meeting(dist.Store):  # type: ignore[misc]
    """What Gloo asks to join two ranks: each sets its own address under a key, and gets the other's."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self._exchange = exchange
        self._mine = b""
        self._addresses: dict[str, bytes] = {}
        self.error: Exception | None = None
        """What `exchange` raised; on its way through Gloo it would lose its type and text."""

    def set(self, key: str, value: bytes) -> None:
        self._mine = self._addresses[key] = bytes(value)

    def get(self, key: str) -> bytes:
        if key not in self._addresses:
            try:
                self._addresses[key] = self._exchange(self._mine)
            except Exception as error:
                self.error = error
                raise
        return self._addresses[key]

    def wait(self, keys: Sequence[str], timeout: datetime.timedelta | None = None) -> None:
        for key in keys:
            self.get(key)


def first_line(error: Exception) -> str:
    """What happened, out of a message of torch.distributed: without source locations, traces and advice."""
    return str(error).splitlines()[0].split("] ")[-1].split(". This is typically")[0]

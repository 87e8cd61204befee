"""2-rank Gloo groups, which carry bytes through host memory, and the store where their ends meet.

Each (router, shard) pair has a group of its own. In one world of all ranks, a dead or hung peer
would block everybody. A pair that breaks, joins or leaves touches nobody else.

How Gloo behaves, measured with torch 2.13 and checked by tests/experts/test_gloo.py:

- a send completes only once the peer has posted a matching receive, so two ends that both send
first never finish;
- a message longer than the receive aborts the receiving *process*; a shorter one is taken silently;
- one wait that misses its deadline closes the pair for good, and wakes every other wait on it, at
both ends;
- nothing else wakes a blocked wait, so a missed wait is also how a pair is closed on purpose;
- joining an absent peer blocks until the store's timeout.
"""

import datetime
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
import torch.distributed

dist: Any = torch.distributed  # torch's stubs leave out most of what this file is about
ROUTER_RANK, SHARD_RANK = 0, 1
DATA_TAG, _UNUSED_TAG = 0, 1


class Work(Protocol):
    """A send or receive under way."""

    def wait(self, timeout_s: float) -> None:
        """Return when it is done.

        Raises ConnectionError, after which the pair is closed, if that takes too long.
        """
        ...


class LinkStore:
    """Where the two ends of a link find each other; hosted by the router, so that it dies with its
    links."""

    def __init__(self, host: str) -> None:
        self.host = host
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)

    @property
    def port(self) -> int:
        return int(self._store.port)

    def forget(self, name: str) -> None:
        """Delete what the ends of link `name` left here; for links that are gone."""
        for key in self._store.list_keys():
            if key.startswith(f"{name}/"):
                self._store.delete_key(key)

    def key_count(self) -> int:
        """How many keys are kept; it must not grow with the number of links that ever were."""
        return len(self._store.list_keys())


class Pair:
    """One end of a 2-rank Gloo group: bytes in, bytes out, every wait bounded."""

    def __init__(
        self, store_host: str, store_port: int, name: str, rank: int, bind_host: str, timeout_s: float
    ) -> None:
        """Join the group `name`; blocks until the other rank has joined, at most about timeout_s.

        bind_host: this machine's address, where the other rank will reach it. Raises ConnectionError.
        """
        timeout = datetime.timedelta(seconds=timeout_s)
        try:
            store = dist.TCPStore(store_host, store_port, is_master=False, timeout=timeout, wait_for_workers=False)
            options = dist.ProcessGroupGloo._Options()
            options._timeout = timeout
            options._devices = [_gloo_device(bind_host)]
            self._group = dist.ProcessGroupGloo(dist.PrefixStore(name, store), rank, 2, options)
        except RuntimeError as error:
            raise ConnectionError(f"link {name} could not be formed: {first_line(error)}") from None
        self._peer = 1 - rank

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


@cache
def _gloo_device(bind_host: str) -> object:
    # One device for all links of a process: each device costs about three threads.
    return dist.ProcessGroupGloo.create_device(hostname=bind_host)


def first_line(error: Exception) -> str:
    """What happened, out of a message of torch.distributed: without source locations, traces and advice."""
    return str(error).splitlines()[0].split("] ")[-1].split(". This is typically")[0]

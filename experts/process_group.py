"""The one file that knows torch.distributed: 2-rank process groups, and the store where their ends meet.

`Pair` carries bytes through host memory (Gloo). `NcclRows` carries rows between two GPUs. A Pair
beside it announces them.

Each (router, shard) pair has a group of its own. In one world of all ranks, a dead or hung peer
would block everybody. A pair that breaks, joins or leaves touches nobody else.

How Gloo behaves, measured with torch 2.13 and checked by tests/experts/test_process_group.py:

- a send completes only once the peer has posted a matching receive, so two ends that both send
first never finish;
- a message longer than the receive aborts the receiving *process*; a shorter one is taken silently;
- one wait that misses its deadline closes the pair for good, and wakes every other wait on it, at
both ends;
- nothing else wakes a blocked wait, so a missed wait is also how a pair is closed on purpose;
- joining an absent peer blocks until the store's timeout.
"""

import datetime
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import torch
import torch.distributed

dist: Any = torch.distributed  # torch's stubs leave out most of what this file is about
ROUTER_RANK, SHARD_RANK = 0, 1
_DATA_TAG, _UNUSED_TAG = 0, 1


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
            raise ConnectionError(f"link {name} could not be formed: {_first_line(error)}") from None
        self._peer = 1 - rank

    def post_receive(self, buffer: torch.Tensor) -> Work:
        """Let the peer's next message fill the front of `buffer` (uint8); it must not be longer
        than the buffer."""
        return _start(lambda: self._group.recv([buffer], self._peer, _DATA_TAG))

    def send(self, message: torch.Tensor, timeout_s: float) -> None:
        """Send `message` (uint8) and return once it may be overwritten. Raises ConnectionError."""
        _start(lambda: self._group.send([message], self._peer, _DATA_TAG)).wait(timeout_s)

    def close(self) -> None:
        """Close the pair: every wait at either end fails now. Harmless on a closed one."""
        never_sent = torch.empty(1, dtype=torch.uint8)
        try:
            _start(lambda: self._group.recv([never_sent], self._peer, _UNUSED_TAG)).wait(0.001)
        except ConnectionError:
            pass  # the miss is the purpose


class RowChannel(Protocol):
    """Carries a message's rows beside the Pair that carries its header.

    Legend: N rows, D model width.
    """

    def send(self, x_ND: torch.Tensor) -> None:
        """Send rows whose number the peer learns from the header."""
        ...

    def receive(self, rows: int, timeout_s: float) -> torch.Tensor:
        """x_ND, valid until the next but one receive. Raises ConnectionError if it takes too long."""
        ...

    def close(self) -> None: ...


class NcclRows:
    """Rows between two GPUs over a communicator and a stream of the link's own.

    Never run: no machine here has a GPU.

    Written to NCCL's documented rules: the receive is posted only after the header told its size,
    so sizes always match and an idle link has no kernel waiting; nothing is allocated in a step;
    the first, slow exchange happens at construction; a deadline is kept by polling an event, and a
    miss aborts the communicator from a helper thread, because aborting may block. Links do not
    wait for each other: each has one communicator, used in one direction at a time, so their sends
    need no common group call.
    """

    def __init__(
        self,
        store_host: str,
        store_port: int,
        name: str,
        rank: int,
        device: torch.device,
        max_rows: int,
        hidden_size: int,
        dtype: torch.dtype,
        timeout_s: float,
    ) -> None:
        # By default torch ends the whole process when a communicator fails; here a failure
        # concerns one link.
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
        timeout = datetime.timedelta(seconds=timeout_s)
        self._stream = torch.cuda.Stream(device)
        self._buffers = [torch.empty(max_rows, hidden_size, dtype=dtype, device=device) for _ in range(2)]
        self._peer = 1 - rank
        self._sending: Any = None
        try:
            store = dist.TCPStore(store_host, store_port, is_master=False, timeout=timeout, wait_for_workers=False)
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = dist.ProcessGroupNCCL(dist.PrefixStore(f"{name}/rows", store), rank, 2, options)
            for sender in (ROUTER_RANK, SHARD_RANK):
                if rank == sender:
                    self.send(self._buffers[0][:1])
                else:
                    self.receive(1, timeout_s)
        except RuntimeError as error:
            raise ConnectionError(f"NCCL link {name} could not be formed: {_first_line(error)}") from None

    def send(self, x_ND: torch.Tensor) -> None:
        rows_ND = x_ND.contiguous()
        self._stream.wait_stream(torch.cuda.current_stream(rows_ND.device))
        with torch.cuda.stream(self._stream), _nccl_errors():
            # Kept until the next send: the rows must not be freed while they travel.
            self._sending = (rows_ND, self._group.send([rows_ND], self._peer, _DATA_TAG))

    def receive(self, rows: int, timeout_s: float) -> torch.Tensor:
        self._buffers.reverse()
        x_ND = self._buffers[0][:rows]
        arrived = torch.cuda.Event()
        with torch.cuda.stream(self._stream), _nccl_errors():
            self._group.recv([x_ND], self._peer, _DATA_TAG).wait()  # makes the stream wait, not this thread
            arrived.record(self._stream)
        deadline = time.monotonic() + timeout_s
        while not arrived.query():
            if time.monotonic() > deadline:
                self.close()
                raise ConnectionError(f"{rows} rows did not arrive within {timeout_s:g} s")
            time.sleep(20e-6)  # only polling an event has a deadline; waiting for one has none
        return x_ND

    def close(self) -> None:
        threading.Thread(target=self._group.abort, name="abort nccl", daemon=True).start()


class _GlooWork:
    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self, timeout_s: float) -> None:
        try:
            self._work.wait(datetime.timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise ConnectionError(_first_line(error)) from None


def _start(operation: Callable[[], Any]) -> _GlooWork:
    try:
        return _GlooWork(operation())
    except RuntimeError as error:
        raise ConnectionError(_first_line(error)) from None


@contextmanager
def _nccl_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(_first_line(error)) from None


@cache
def _gloo_device(bind_host: str) -> object:
    # One device for all links of a process: each device costs about three threads.
    return dist.ProcessGroupGloo.create_device(hostname=bind_host)


def _first_line(error: Exception) -> str:
    # Gloo's messages carry source locations, stack traces and advice; what happened ends the first
    # line.
    return str(error).splitlines()[0].split("] ")[-1].split(". This is typically")[0]

"""Rows between two GPUs: 2-rank NCCL groups, beside the connection that announces the rows."""

import datetime
import logging
import math
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
import torch.distributed

logger = logging.getLogger(__name__)

dist: Any = torch.distributed  # torch's stubs leave out most of what this file is about
ROUTER_RANK, SHARD_RANK = 0, 1
_TAG = 0

NCCL_ENVIRONMENT = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
"""For the environment that a process starts with: torch may read it early.

By default torch ends the whole process when a communicator fails, or when its watchdog hangs. Here
a failure concerns one link.
"""


class RowStore:
    """Where the two ends of a link's NCCL groups find each other; hosted by the router, for all its links.

    It listens on the node's one address, but asks nobody for a secret: whoever reaches the port can
    read and write. NCCL's own ports trust the network, too.
    """

    def __init__(self, host: str) -> None:
        self.host = host
        listener = socket.create_server((host, 0))
        self.port = int(listener.getsockname()[1])
        self._store = dist.TCPStore(
            host, self.port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )

    def forget(self, name: str) -> None:
        """Delete what the ends of link `name` left here; for links that are gone."""
        for key in self._store.list_keys():
            if key.startswith(f"{name}/"):
                self._store.delete_key(key)


class Work(Protocol):
    """A send or receive that is queued."""

    def wait(self) -> object:
        """Make the current stream wait for it; this thread does not wait."""
        ...


class Communicator(Protocol):
    """A 2-rank group. What it is given, it does in order, after what the current stream was given before."""

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Work: ...
    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Work: ...
    def abort(self) -> None:
        """End it and all that it was given, which then counts as done. May block."""
        ...


class Mark(Protocol):
    """A point in a stream's work."""

    def query(self) -> bool:
        """Whether the stream has got there."""
        ...


class Gpu(Protocol):
    """What NcclRows needs of a device, its streams, and the library that joins two of them."""

    def communicator(self, name: str, rank: int) -> Communicator:
        """Raises RuntimeError."""
        ...

    def stream(self) -> Any:
        """A new stream."""
        ...

    def on(self, stream: Any) -> AbstractContextManager[object]:
        """Makes `stream` the current one of this thread."""
        ...

    def mark(self) -> Mark:
        """The end of what the current stream was given so far."""
        ...

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory that the current stream may fill.

        Once dropped, it is not used again before the default stream has finished what it was given.
        """
        ...


class Cuda:
    """The real one. Never run: no machine here has a GPU."""

    def __init__(self, store_host: str, store_port: int, device: torch.device, timeout_s: float) -> None:
        """The store is a RowStore's. timeout_s: for the other rank to join."""
        self._store_address, self._device = (store_host, store_port), device
        self._timeout = datetime.timedelta(seconds=timeout_s)

    def communicator(self, name: str, rank: int) -> Communicator:
        store = dist.TCPStore(*self._store_address, is_master=False, timeout=self._timeout, wait_for_workers=False)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = self._timeout
        group: Communicator = dist.ProcessGroupNCCL(dist.PrefixStore(name, store), rank, 2, options)
        return group

    def stream(self) -> Any:
        return torch.cuda.Stream(self._device)

    def on(self, stream: Any) -> AbstractContextManager[object]:
        return torch.cuda.stream(stream)

    def mark(self) -> Mark:
        mark = torch.cuda.Event()
        mark.record(torch.cuda.current_stream(self._device))
        return mark

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        memory = torch.empty(*shape, dtype=dtype, device=self._device)
        memory.record_stream(torch.cuda.default_stream(self._device))
        return memory


class NcclRows:
    """Rows between two GPUs over two communicators of the link's own, one in each direction.

    A communicator keeps one queue for both directions. With rows under way both ways, each end's
    send would wait behind it for the other's receive, for ever. tests/experts/nccl.py has that rule
    and those below, and shows the deadlock; on a GPU this was never run.

    - A receive is queued only after the header told its size, so that sizes always match, and an
      idle link has no kernel waiting.
    - The first, slow exchange happens at construction.
    - A thread can wait for a GPU only without a deadline, so it looks at a mark again and again.
    - `close` aborts in a thread of its own, because aborting may block.

    Sends come from one thread, receives from one other; `close` from any.
    """

    def __init__(self, gpu: Gpu, name: str, rank: int, hidden_size: int, dtype: torch.dtype, timeout_s: float) -> None:
        """Returns once both ends have joined. Raises ConnectionError, after about timeout_s."""
        self._gpu, self._peer, self._row = gpu, 1 - rank, (hidden_size, dtype)
        self._closing = threading.Lock()
        self._is_closed = False
        self._under_way: deque[tuple[torch.Tensor, Mark]] = deque()
        """What was sent, and perhaps not yet read by the GPU."""
        self._sending, self._receiving = gpu.stream(), gpu.stream()
        self._communicators: dict[int, Communicator] = {}
        try:
            for sender in (ROUTER_RANK, SHARD_RANK):
                self._communicators[sender] = gpu.communicator(f"{name}/rows-from-{sender}", rank)
                if rank == sender:
                    self.send(gpu.empty((1, hidden_size), dtype))
                else:
                    self._receive(1, timeout_s)
        except (RuntimeError, ConnectionError) as error:
            self.close()
            raise ConnectionError(f"NCCL link {name} could not be formed: {_first_line(error)}") from None

    def send(self, x_ND: torch.Tensor) -> None:
        """Queue rows, which must not change any more. Raises ConnectionError."""
        while self._under_way and self._under_way[0][1].query():
            self._under_way.popleft()
        rows_ND = x_ND.contiguous()
        with self._nccl_errors():
            work = self._communicators[1 - self._peer].send([rows_ND], self._peer, _TAG)
            with self._gpu.on(self._sending):
                work.wait()
                self._under_way.append((rows_ND, self._gpu.mark()))

    def receive(self, rows: int) -> torch.Tensor:
        """x_ND; waits until it has come, or `close`. Raises ConnectionError."""
        return self._receive(rows, math.inf)

    def _receive(self, rows: int, timeout_s: float) -> torch.Tensor:
        hidden_size, dtype = self._row
        with self._nccl_errors(), self._gpu.on(self._receiving):
            x_ND = self._gpu.empty((rows, hidden_size), dtype)
            self._communicators[self._peer].recv([x_ND], self._peer, _TAG).wait()
            arrived = self._gpu.mark()
        deadline = time.monotonic() + timeout_s
        # Asking an event spoils a CUDA graph that another thread captures in the default mode:
        # captures need capture_error_mode="thread_local".
        while not arrived.query() and not self._is_closed:
            if time.monotonic() > deadline:
                raise ConnectionError(f"{rows} rows did not arrive within {timeout_s:g} s")
            time.sleep(20e-6)  # whoever waits for the GPU itself cannot be woken by `close`
        if self._is_closed:
            raise ConnectionError("closed")
        return x_ND

    def close(self) -> None:
        """End every send and receive. Harmless on a closed one."""
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
        threading.Thread(target=self._abort, name="abort nccl", daemon=True).start()

    def _abort(self) -> None:
        for communicator in self._communicators.values():
            try:
                communicator.abort()
            except RuntimeError:
                logger.exception("aborting an NCCL group failed")  # the other one must still be

    @contextmanager
    def _nccl_errors(self) -> Iterator[None]:
        if self._is_closed:
            raise ConnectionError("closed")
        try:
            yield
        except RuntimeError as error:
            raise ConnectionError(_first_line(error)) from None


def _first_line(error: Exception) -> str:
    """What happened, out of a message of torch.distributed: without source locations, traces and advice."""
    return str(error).partition("\n")[0].split("] ")[-1].split(". This is typically")[0] or repr(error)

"""Rows between two GPUs: 2-rank NCCL groups, beside the Gloo pair that announces the rows."""

import datetime
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed

from experts.groups.gloo import DATA_TAG, ROUTER_RANK, SHARD_RANK, first_line

dist: Any = torch.distributed  # torch's stubs leave out most of what this file is about


class RowStore:
    """Where the two ends of a link's NCCL group find each other; hosted by the router.

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

    def key_count(self) -> int:
        """How many keys are kept; it must not grow with the number of links that ever were."""
        return len(self._store.list_keys())


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
            raise ConnectionError(f"NCCL link {name} could not be formed: {first_line(error)}") from None

    def send(self, x_ND: torch.Tensor) -> None:
        rows_ND = x_ND.contiguous()
        self._stream.wait_stream(torch.cuda.current_stream(rows_ND.device))
        with torch.cuda.stream(self._stream), _nccl_errors():
            # Kept until the next send: the rows must not be freed while they travel.
            self._sending = (rows_ND, self._group.send([rows_ND], self._peer, DATA_TAG))

    def receive(self, rows: int, timeout_s: float = math.inf) -> torch.Tensor:
        self._buffers.reverse()
        x_ND = self._buffers[0][:rows]
        arrived = torch.cuda.Event()
        with torch.cuda.stream(self._stream), _nccl_errors():
            self._group.recv([x_ND], self._peer, DATA_TAG).wait()  # makes the stream wait, not this thread
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


@contextmanager
def _nccl_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(first_line(error)) from None

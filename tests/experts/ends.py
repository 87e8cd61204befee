"""Both ends of a connection in this process."""

import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from experts.connection import Connection, Listener, connect
from experts.link import Reply
from tests.processes import PATIENCE_S, wait_until

HOST, HOST_IN_PROC = "127.0.0.1", "0100007F"
SECRET = b"known to both ends"


def taken(reply: Reply) -> torch.Tensor:
    """What a reply brings, however long that takes. Raises what `take` raises."""
    wait_until(lambda: reply.done)
    return reply.take()


def join_both(path: "SlowPath | None" = None) -> tuple[Connection, Connection]:
    """The router's end, the shard's end. path: what lies between them."""
    listener = Listener(HOST)
    address = listener.address if path is None else path.in_front_of(listener.address)
    with ThreadPoolExecutor(1) as pool:
        shard = pool.submit(listener.accept, SECRET, PATIENCE_S)
        return connect(address, SECRET, PATIENCE_S), shard.result(PATIENCE_S)


def listening() -> set[tuple[str, int]]:
    """The (address, port) pairs on which this process listens; addresses as /proc/net/tcp spells them."""
    of_this_process = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            of_this_process.add(os.readlink(f"/proc/self/fd/{entry}"))
        except FileNotFoundError:
            pass  # the directory's own
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in of_this_process:
                address, port = local.split(":")
                found.add((address, int(port, 16)))
    return found


class SlowPath:
    """A path between two ends that carries `bytes_per_s` in each direction: a TCP proxy.

    Use as a context manager.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._open: list[socket.socket] = []
        self.carried = 0

    def in_front_of(self, address: tuple[str, int]) -> tuple[str, int]:
        """The address to connect to instead."""
        listener = socket.create_server((HOST, 0))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        self._open.append(listener)
        threading.Thread(target=self._accept, args=(listener, address), daemon=True).start()
        near: tuple[str, int] = listener.getsockname()
        return near

    def _accept(self, listener: socket.socket, target: tuple[str, int]) -> None:
        try:
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(target)
                self._open += [near, far]
                for source, sink in ((near, far), (far, near)):
                    source.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
                    threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()
        except OSError:
            pass  # closed

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        began_s, carried = time.monotonic(), 0
        try:
            while chunk := source.recv(2**14):
                carried += len(chunk)
                self.carried += len(chunk)
                began_s = max(began_s, time.monotonic() - 0.05 - carried / self._bytes_per_s)  # no credit for idling
                time.sleep(max(0.0, began_s + carried / self._bytes_per_s - time.monotonic()))  # this is the slowness
                sink.sendall(chunk)
        except OSError:
            pass
        sink.close()

    def __enter__(self) -> "SlowPath":
        return self

    def __exit__(self, *exception: object) -> None:
        for opened in self._open:
            opened.close()

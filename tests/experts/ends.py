"""Both ends of a pair in this process."""

import os
import socket
import threading
import time
from concurrent.futures import Future
from pathlib import Path

from experts.groups.gloo import ROUTER_RANK, SHARD_RANK, Exchange, Pair
from tests.processes import PATIENCE_S

HOST, HOST_IN_PROC = "127.0.0.1", "0100007F"
SECRET = b"known to both ends"


def meeting() -> tuple[Exchange, Exchange]:
    """The exchanges of two ends that meet in this process: the router's, the shard's."""
    addresses: tuple[Future[bytes], Future[bytes]] = (Future(), Future())

    def of(rank: int) -> Exchange:
        def exchange(mine: bytes) -> bytes:
            addresses[rank].set_result(mine)
            return addresses[1 - rank].result(PATIENCE_S)

        return exchange

    return of(ROUTER_RANK), of(SHARD_RANK)


def join_both(name: str, exchanges: tuple[Exchange, Exchange] | None = None) -> tuple[Pair, Pair]:
    """The router's end, the shard's end. exchanges: theirs; by default they meet directly."""
    ends: dict[int, Pair] = {}
    exchanges = exchanges or meeting()

    def join(rank: int) -> None:
        ends[rank] = Pair(name, rank, HOST, SECRET, exchanges[rank], PATIENCE_S)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in (ROUTER_RANK, SHARD_RANK)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    return ends[ROUTER_RANK], ends[SHARD_RANK]


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
    """A path between two ends that carries `bytes_per_s` in each direction: a TCP proxy in front of each port.

    Stands between two ends that meet by `exchanges`. Use as a context manager.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._open: list[socket.socket] = []
        self._addresses: tuple[Future[bytes], Future[bytes]] = (Future(), Future())
        self.carried = 0

    def exchanges(self) -> tuple[Exchange, Exchange]:
        """As `meeting`; but each end learns a proxy's port instead of the other's."""

        def of(rank: int) -> Exchange:
            def exchange(mine: bytes) -> bytes:
                self._addresses[rank].set_result(mine)
                return self._in_front_of(self._addresses[1 - rank].result(PATIENCE_S), mine)

            return exchange

        return of(ROUTER_RANK), of(SHARD_RANK)

    def _in_front_of(self, address: bytes, peer: bytes) -> bytes:
        """The address with a proxy's port, for the peer to connect to.

        Of two ends the one with the lower port waits. Both must see the order that they had without proxies.
        """
        at, peer_at = port_in(address), port_in(peer)
        true_port, peer_port = address[at : at + 2], peer[peer_at : peer_at + 2]
        for _ in range(1000):
            listener = socket.create_server((HOST, 0))
            self._open.append(listener)
            port = listener.getsockname()[1].to_bytes(2, "big")
            if (port[::-1] > peer_port[::-1]) == (true_port[::-1] > peer_port[::-1]):  # Gloo swaps the bytes
                break
        threading.Thread(target=self._accept, args=(listener, int.from_bytes(true_port, "big")), daemon=True).start()
        return address[:at] + port + address[at + 2 :]

    def _accept(self, listener: socket.socket, target: int) -> None:
        try:
            while True:
                near, _ = listener.accept()
                far = socket.create_connection((HOST, target))
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


def port_in(address: bytes) -> int:
    """Where the port is in a Gloo address of this process."""
    ports = {port for _, port in listening()}
    [at] = [at for at in range(len(address) - 1) if int.from_bytes(address[at : at + 2], "big") in ports]
    return at

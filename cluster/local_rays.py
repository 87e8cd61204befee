"""Where the local Rays of this machine's `drover serve` processes are, so that other commands find the right one.

One small file per serving process in ~/.drover/, named by namespace and process id. Plain Python, and no Ray.
"""

import json
import os
import socket
from pathlib import Path

CONNECT_TIMEOUT_S = 5.0


def record_local_ray(namespace: str, address: str) -> None:
    """Note that this process runs a local Ray at `address` (host:port) for `namespace`."""
    path = _folder() / f"{namespace}.{os.getpid()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"namespace": namespace, "address": address, "pid": os.getpid()}))


def forget_local_ray() -> None:
    """Take back what this process noted; harmless if it noted nothing."""
    for path in _folder().glob(f"*.{os.getpid()}.json"):
        path.unlink(missing_ok=True)


def find_local_ray(namespace: str) -> str | None:
    """The address of the local Ray that serves `namespace`, or None. Notes of processes that are gone are removed."""
    for path in sorted(_folder().glob(f"{namespace}.*.json")):
        try:
            note = json.loads(path.read_text())
            address = str(note["address"])
        except (OSError, ValueError, KeyError):
            continue  # being written, or removed, just now
        if is_reachable(address):
            return address
        path.unlink(missing_ok=True)
    return None


def is_reachable(address: str) -> bool:
    """Whether something listens at host:port."""
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdigit():
        return False
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def _folder() -> Path:
    return Path.home() / ".drover"

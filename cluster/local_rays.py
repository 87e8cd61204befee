"""Addresses of the local Rays that `drover serve` runs on this machine, for `drover status` and `drover stop`.

Each serving process writes one small file in ~/.drover/, named by namespace and process id. Plain
Python without Ray.
"""

import json
import os
import shutil
import socket
from pathlib import Path

from cluster.addresses import split_address
from cluster.private_folder import home, private_folder

CONNECT_TIMEOUT_S = 5.0


def record_local_ray(namespace: str, address: str) -> None:
    """Write that this process runs a local Ray at `address` (host:port) for `namespace`."""
    path = _folder() / f"{namespace}.{os.getpid()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"namespace": namespace, "address": address, "pid": os.getpid()}))


def forget_local_ray(process_id: int | None = None) -> None:
    """Remove a process's files, by default this one's, if there are any."""
    process_id = process_id or os.getpid()
    for path in _folder().glob(f"*.{process_id}.json"):
        path.unlink(missing_ok=True)
    shutil.rmtree(haproxy_folder(process_id), ignore_errors=True)


def haproxy_folder(process_id: int) -> Path:
    """Where the HAProxy of a process's local Ray has its files.

    Names are short: Ray adds the node's id, of 56 letters, and HAProxy takes socket paths of 97
    bytes at most.
    """
    return private_folder() / f"h{process_id}"


def find_local_ray(namespace: str) -> str | None:
    """The address of the local Ray that serves `namespace`, or None.

    Removes files of processes that are gone.
    """
    for path in sorted(_folder().glob(f"{namespace}.*.json")):
        try:
            note = json.loads(path.read_text())
            address = str(note["address"])
        except (OSError, ValueError, KeyError):
            continue  # it is being written or removed right now
        if is_reachable(address):
            return address
        path.unlink(missing_ok=True)
    return None


def is_reachable(address: str) -> bool:
    """Whether something listens at host:port."""
    try:
        socket.create_connection(split_address(address), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError):
        return False
    return True


def _folder() -> Path:
    return home() / ".drover"

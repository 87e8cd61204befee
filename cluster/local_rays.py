"""Addresses of the local Rays that `drover serve` runs on this machine, for `drover status` and `drover stop`.

Each serving process writes one small file in ~/.drover/, named by namespace and process id. Plain
Python without Ray.
"""

import json
import os
import re
import shutil
import socket
from pathlib import Path
from typing import Any

from cluster.addresses import split_address
from cluster.marked_processes import lives, mark_of_this_process
from cluster.private_folder import home, private_folder

CONNECT_TIMEOUT_S = 5.0


def record_local_ray(namespace: str, address: str) -> None:
    """Write that this process runs a local Ray at `address` (host:port) for `namespace`."""
    path = _folder() / f"{namespace}.{os.getpid()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    note = {"address": address, "pid": os.getpid(), "machine": socket.gethostname(), "mark": mark_of_this_process()}
    path.write_text(json.dumps(note))


def forget_local_ray(process_id: int | None = None) -> None:
    """Remove a process's files, by default this one's, if there are any."""
    process_id = process_id or os.getpid()
    for path in _folder().glob(f"*.{process_id}.json"):
        path.unlink(missing_ok=True)
    shutil.rmtree(haproxy_folder(process_id), ignore_errors=True)


def forget_gone_rays() -> None:
    """Remove the files of this machine's processes that are gone: killed, they could not."""
    for path in _folder().glob("*.*.json"):
        note = _note(path)
        if note is not None and note.get("machine") == socket.gethostname() and not lives(str(note.get("mark"))):
            forget_local_ray(int(path.name.split(".")[-2]))


def haproxy_folder(process_id: int) -> Path:
    """Where the HAProxy of a process's local Ray has its files.

    Names are short: Ray adds the node's id, of 56 letters, and HAProxy takes socket paths of 97
    bytes at most.
    """
    return private_folder() / f"h{process_id}"


def find_local_ray(namespace: str) -> str | None:
    """The address of the local Ray that serves `namespace`, or None.

    Removes files of processes that are gone. Something else may listen at their address now.
    """
    forget_gone_rays()
    for path in sorted(_folder().glob(f"{namespace}.*.json")):
        note = _note(path)
        address = "" if note is None else str(note.get("address"))
        if is_reachable(address):
            return address
        if note is not None:
            path.unlink(missing_ok=True)
    return None


def _note(path: Path) -> dict[str, Any] | None:
    """None while it is being written or removed."""
    try:
        note = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) and re.fullmatch(r".+\.[0-9]+\.json", path.name) else None


def is_reachable(address: str) -> bool:
    """Whether something listens at host:port."""
    try:
        socket.create_connection(split_address(address), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError):
        return False
    return True


def _folder() -> Path:
    return home() / ".drover"

"""Addresses of the local Rays that `drover serve` runs on this machine, for `drover status` and `drover stop`.

Each serving process writes one small file in ~/.drover/, named by namespace and process id. Plain
Python without Ray.
"""

import json
import os
import re
import shutil
import signal
import socket
from contextlib import suppress
from pathlib import Path

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


def end_orphaned_proxies() -> list[int]:
    """End the HAProxies of local Rays that are gone, and return their process ids.

    A HAProxy survives if Ray and whoever started it were killed at once. It keeps its ports, and
    answers that there is nobody behind it. Its config is in a folder with its starter's process id.
    """
    ended = []
    pattern = re.compile(re.escape(str(private_folder())) + r"/h(\d+)/")
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace") if entry.name.isdigit() else ""
        except OSError:
            continue  # it ended in the meantime
        match = pattern.search(command)
        if match and "haproxy\0" in command and not _is_serving(int(match[1])):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(int(entry.name), signal.SIGKILL)
                ended.append(int(entry.name))
    return ended


def _is_serving(process_id: int) -> bool:
    """Whether a process lives that may have a local Ray; ids are used again, by other programs."""
    try:
        return b"python" in Path(f"/proc/{process_id}/cmdline").read_bytes()
    except OSError:
        return False


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
    return home() / ".drover"

"""HAProxy of this process's Ray, for tests."""

import csv
import os
import socket
from collections import Counter
from contextlib import suppress
from pathlib import Path

from cluster.local_rays import haproxy_folder

FOLDER = haproxy_folder(os.getpid())


def haproxy_pids() -> list[int]:
    """Its process, and those that a reload has replaced and that still have streams."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # gone
            command = entry.read_bytes().split(b"\0")
            if b"haproxy" in command[0] and any(str(FOLDER).encode() in word for word in command):
                found.append(int(entry.parent.name))
    return found


def replicas_it_calls() -> int:
    """How many frontend replicas take calls from it, by its own checks; over HTTP and gRPC, whichever are fewer."""
    up = Counter[str]()
    for server in _servers():
        up[server["# pxname"]] += server["status"] == "UP"
    return min(up.values(), default=0)


def _servers() -> list[dict[str, str]]:
    """The replicas in each backend. Serve's own proxy is none: it is the backup, and has a backend of its own."""
    answer = b""
    for path in FOLDER.glob("*/a.sock"):
        with suppress(OSError), socket.socket(socket.AF_UNIX) as admin:  # it starts again
            admin.connect(str(path))
            admin.sendall(b"show stat\n")
            while piece := admin.recv(65536):
                answer += piece
    rows = csv.DictReader(answer.decode().splitlines())
    servers = [row for row in rows if row["svname"] not in ("FRONTEND", "BACKEND") and row["act"] == "1"]
    return [server for server in servers if "fallback" not in server["# pxname"]]

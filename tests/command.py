"""The `drover` command in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

from tests.loopback import PATIENCE_S

DROVER = [sys.executable, "-m", "cli.main"]
ROOT = Path(__file__).parents[1]


def drover(*arguments: str, stdin: str | bytes = "") -> subprocess.CompletedProcess[str]:
    raw = stdin if isinstance(stdin, bytes) else stdin.encode()
    done = subprocess.run([*DROVER, *arguments], input=raw, capture_output=True, timeout=PATIENCE_S, cwd=ROOT)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def start(*arguments: str, **pipes: int) -> subprocess.Popen[bytes]:
    """A running `drover`; stdin, stdout and stderr are unbuffered pipes unless said otherwise."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | pipes
    return subprocess.Popen([*DROVER, *arguments], cwd=ROOT, bufsize=0, **pipes)


def read_until(stream_fd: int, awaited: bytes) -> bytes:
    """Read from a pipe or terminal until `awaited` has come; pytest's timeout bounds it."""
    received = b""
    while awaited not in received:
        piece = os.read(stream_fd, 4096)
        assert piece, f"ended after {received!r}, still waiting for {awaited!r}"
        received += piece
    return received

"""The `drover` command in a process of its own."""

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.loopback import PATIENCE_S

DROVER = [sys.executable, "-m", "cli.main"]
ROOT = Path(__file__).parents[1]


def drover(
    *arguments: str, stdin: str | bytes = "", env: dict[str, str] | None = None, timeout_s: float = PATIENCE_S
) -> subprocess.CompletedProcess[str]:
    raw = stdin if isinstance(stdin, bytes) else stdin.encode()
    command = [*DROVER, *arguments]
    done = subprocess.run(command, input=raw, capture_output=True, timeout=timeout_s, cwd=ROOT, env=env, check=False)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


@contextmanager
def start(*arguments: str, env: dict[str, str] | None = None, **pipes: int) -> Iterator[subprocess.Popen[bytes]]:
    """A running `drover`; stdin, stdout and stderr are unbuffered pipes unless said otherwise. Ends with the block."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | pipes
    with subprocess.Popen([*DROVER, *arguments], cwd=ROOT, bufsize=0, env=env, **pipes) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


class Screen:
    """What comes out of a pipe or terminal, read up to awaited words; what follows them is kept for the next call."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._unread = b""

    def read_until(self, awaited: bytes, timeout_s: float = PATIENCE_S) -> bytes:
        """Everything up to and including `awaited`."""
        deadline = time.monotonic() + timeout_s
        while awaited not in self._unread:
            readable, _, _ = select.select([self._fd], [], [], max(deadline - time.monotonic(), 0))
            assert readable, f"waited for {awaited!r} in vain, got {self._unread!r}"
            piece = os.read(self._fd, 4096)
            assert piece, f"ended after {self._unread!r}, still waiting for {awaited!r}"
            self._unread += piece
        before, _, self._unread = self._unread.partition(awaited)
        return before + awaited

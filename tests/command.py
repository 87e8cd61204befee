"""The `drover` command: in this process where that shows the same, or in one of its own."""

import io
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from cli.main import main
from tests.processes import PATIENCE_S

DROVER = [sys.executable, "-m", "cli.main"]
ROOT = Path(__file__).parents[1]


def drover(*arguments: str | Path, stdin: str | bytes = "") -> subprocess.CompletedProcess[str]:
    """Run a command line in this process, with pipes for stdin, stdout and stderr.

    For commands that import what this process has imported anyway, and that leave Ray and signals alone.
    """
    raw = stdin if isinstance(stdin, bytes) else stdin.encode()
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        patch("sys.stdin", io.TextIOWrapper(io.BytesIO(raw), "utf-8")),
        patch.dict(os.environ, {"COLUMNS": "80"}),  # puts back what the command sets
    ):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return subprocess.CompletedProcess([*DROVER, *map(str, arguments)], code, _written(out), _written(err))


def _written(stream: io.TextIOWrapper) -> str:
    stream.flush()
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode()


def drover_process(
    *arguments: str | Path, stdin: str = "", env: dict[str, str] | None = None, timeout_s: float = PATIENCE_S
) -> subprocess.CompletedProcess[str]:
    """Run a command line in a process of its own."""
    command = [*DROVER, *map(str, arguments)]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=timeout_s, cwd=ROOT, env=env, check=False
    )


# The last line of stdout tells the exit code, and which of the modules asked about were loaded.
WATCHED = """
import json, sys
asked, statement = sys.argv[1].split(), sys.argv[2]
sys.argv[1:3] = []
code = 0
try:
    exec(statement)
except SystemExit as end:
    code = end.code
print("\\n" + json.dumps([code, sorted(set(asked) & set(sys.modules))]))
"""
RUN_COMMAND = "from cli.main import main; code = main(sys.argv[1:])"


@dataclass(frozen=True)
class Watched:
    """What a fresh interpreter did, and which modules it loaded for it."""

    returncode: int
    stdout: str
    stderr: str
    loaded: list[str]


def watched(asked: str, statement: str, *arguments: str, stdin: str = "", env: dict[str, str] | None = None) -> Watched:
    """Run `statement` in a process of its own. asked: the names of modules, separated by spaces."""
    command = [sys.executable, "-c", WATCHED, asked, statement, *arguments]
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=PATIENCE_S, cwd=ROOT, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    stdout, _, verdict = done.stdout.rstrip("\n").rpartition("\n")
    code, loaded = json.loads(verdict)
    return Watched(code, stdout, done.stderr, loaded)


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

"""Starts a worker (see bench/worker.py), asks it, and ends it."""

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from bench.errors import BenchError
from bench.worker import Answer, Request, job_line, parse_answer

ROOT = Path(__file__).parents[1]
START_TIMEOUT_S = 300.0
JOB_TIMEOUT_S = 300.0
END_TIMEOUT_S = 20.0
_LOG_LINES = 5


class Worker:
    """A running worker. Its session is its own, so that Ctrl-C reaches the benchmark alone, which then ends it."""

    def __init__(self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        """Returns when the worker is ready. env: added to this process's. Raises BenchError."""
        self._name, self._log = name, log
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=ROOT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )
        try:
            self._read(START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def ask(self, requests: Sequence[Request]) -> Answer:
        """Run one job. A request that was refused has its error in its stream. Raises BenchError if the worker dies."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(job_line(requests).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        return parse_answer(self._read(JOB_TIMEOUT_S + max(request.at_s for request in requests)))

    def close(self) -> None:
        """End the worker, and whatever it started."""
        end(self._process)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, timeout_s: float) -> dict[str, Any]:
        stdout: IO[bytes] | None = self._process.stdout
        assert stdout is not None
        deadline, line = time.monotonic() + timeout_s, b""
        while not line.endswith(b"\n"):
            readable, _, _ = select.select([stdout], [], [], max(deadline - time.monotonic(), 0))
            if not readable:
                raise BenchError(f"{self._name} did not answer within {timeout_s:.0f} s; its log is {self._log}")
            piece = os.read(stdout.fileno(), 1 << 20)
            if not piece:
                raise self._died()
            line += piece
        raw: dict[str, Any] = json.loads(line)
        return raw

    def _died(self) -> BenchError:
        self._process.wait()
        return BenchError(f"{self._name} ended by itself; {last_lines(self._log)}")


def end(process: subprocess.Popen[Any], first: signal.Signals = signal.SIGTERM) -> None:
    """End a process that leads its own session, and what is left of the session. first: the polite signal."""
    try:
        if process.poll() is None:
            process.send_signal(first)
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                pass  # the session's end follows
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # nothing is left, as it should be
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def last_lines(log: Path) -> str:
    """What a log ends with, for an error message."""
    lines = log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
    return f"the end of {log}:\n  " + "\n  ".join(lines)

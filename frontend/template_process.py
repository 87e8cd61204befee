"""Renders chat templates in a process of their own, which is bounded in time and memory.

See frontend/template_child.py for why. The process starts with the first job and is replaced when
it has ended. It keeps nothing that a new one would not have.
"""

import atexit
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from checkpoint.errors import DroverError

_CHILD = Path(__file__).with_name("template_child.py")
TIME_S = 5.0
"""What compiling and rendering a template may take. The templates in use take less than a millisecond."""


class TemplateFailed(DroverError):
    """The template refused what it was given, or broke. line: of its source, if it cannot be parsed."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


class TemplateProcessEnded(TemplateFailed):
    """The process was killed from outside, by the system for want of memory for instance, and so was the next."""


class TemplateProcess:
    """Any thread may call it; one job runs at a time."""

    def __init__(self, time_s: float = TIME_S) -> None:
        self._time_s = time_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        atexit.register(self._end)

    def check(self, source: str) -> None:
        """Compile a template. Raises TemplateFailed."""
        self._run({"source": source, "variables": None, "now": 0.0, "most_chars": 0})

    def render(self, source: str, variables: dict[str, Any], now_s: float, most_chars: int) -> str:
        """The template's text. variables: plain data. now_s: seconds since the epoch, for strftime_now.

        Raises TemplateFailed, also if the text is longer than most_chars; TemplateProcessEnded.
        """
        return self._run({"source": source, "variables": variables, "now": now_s, "most_chars": most_chars})

    def close(self) -> None:
        """End the process; the next job starts another."""
        with self._lock:
            self._end()

    def _run(self, job: dict[str, Any]) -> str:
        line = json.dumps(job | {"time_s": self._time_s})
        with self._lock:
            try:
                answer = self._ask(line)
            except TemplateProcessEnded:  # that may concern this one process alone
                answer = self._ask(line)
        if "error" in answer:
            raise TemplateFailed(answer["error"], answer["line"])
        text: str = answer["text"]
        return text

    def _ask(self, line: str) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._process = subprocess.Popen(
                [sys.executable, str(_CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            print(line, file=process.stdin, flush=True)
            answered = process.stdout.readline()
        except BrokenPipeError:
            answered = ""
        if answered.endswith("\n"):
            answer: dict[str, Any] = json.loads(answered)
            return answer
        status = process.wait()
        self._end()
        if status == -signal.SIGALRM:
            raise TemplateFailed(f"it did not end within {self._time_s:g} s")
        if status in (-signal.SIGKILL, -signal.SIGTERM):
            raise TemplateProcessEnded("the process that renders chat templates was killed")
        raise TemplateFailed(f"its process ended with status {status}")

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                pass  # what it never read


TEMPLATE_PROCESS = TemplateProcess()
"""The one of this process: templates leave nothing behind in it that another could meet."""

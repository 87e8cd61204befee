"""What other processes do: they notify nobody, so that tests look again and again."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

# Longer than anything waited for takes on a slow and busy machine; far below what pytest allows a test.
PATIENCE_S = 60.0


def wait_until(condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    """Look until `condition` holds; fails after `timeout_s`."""
    never_set, deadline_s = threading.Event(), time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        never_set.wait(0.02)


def processes_with(mark: str) -> dict[int, str]:
    """The processes that have NAME=VALUE in the environment that they started with: command lines by process id."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue  # gone, a zombie, or somebody else's
    return found

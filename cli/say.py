"""Words on stdout that must not end whoever says them: a terminal or a pipe may be gone."""

import os
import sys


def say(text: str) -> None:
    """Print a line, now; once nobody can read it, nothing."""
    try:
        print(text, flush=True)
    except OSError:
        discard_stdout()


def discard_stdout() -> None:
    """Send the rest to /dev/null: Python flushes stdout once more at exit, and fails there again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

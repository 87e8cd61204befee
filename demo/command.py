"""How every `python -m demo.…` ends: with one line for what went wrong, and never with a stack trace for it."""

import argparse
import sys
from collections.abc import Callable

from checkpoint.errors import DroverError


def exit_code(main: Callable[[], int]) -> int:
    """What `main` returns; 1 for what a user can mend, 130 for Ctrl-C."""
    try:
        return main()
    except (DroverError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on with what is not done yet", file=sys.stderr)
        return 130


def at_least_one(text: str) -> int:
    """A count, as an argparse type."""
    count = int(text) if text.strip().isdecimal() else 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return count

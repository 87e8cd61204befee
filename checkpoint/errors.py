"""The errors that a user can cause or should see.

    DroverError
    ├── CheckpointError      a checkpoint directory is missing something, damaged or inconsistent
    ├── ConfigError          a deployment file has a wrong key or value            (cluster/config.py)
    ├── StartError           the cluster could not be started                      (cluster/launch.py)
    ├── NoRoom               the KV cache does not fit beside the weights          (router/kv_budget.py)
    └── RequestError         one request cannot be answered                        (router/errors.py)

`str(error)` is a complete message for the user. It names the field or file, the value, and the
valid values. Broken invariants are assertions instead.

What others wrote, such as a file's contents, is put into messages by `quoted`: escaped and short.
"""

from collections.abc import Sequence
from reprlib import Repr

_MOST_CHARS = 8000


class DroverError(Exception):
    """Root of every error whose text is meant for a user, and drives no terminal."""

    def __str__(self) -> str:
        text = super().__str__()[:_MOST_CHARS]
        if text.isprintable():
            return text
        return "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text)


class CheckpointError(DroverError):
    """A checkpoint directory is missing something, damaged or inconsistent."""


def listed(problems: Sequence[str]) -> str:
    """What follows the colon of a message: one problem in the same line, several in a line each."""
    return f" {problems[0]}" if len(problems) == 1 else "".join(f"\n  {problem}" for problem in problems)


def quoted(value: object, most_chars: int = 200) -> str:
    """Foreign data for a message: as a Python literal, in one line, with its middle left out where it is long.

    Data may be nested without end, and numbers too long to be written.
    """
    short = Repr()
    short.maxlevel = 3
    short.maxstring = short.maxother = short.maxlong = most_chars
    try:
        text = short.repr(value)
    except ValueError:  # more digits than Python converts
        text = "a very long number"
    return text if len(text) <= most_chars else f"{text[:most_chars]}..."

"""Reads the small files of a checkpoint, which may be anything: damaged, hostile, or no files at all.

Only regular files are read, and only up to a size: a FIFO would block for ever, /dev/zero never
ends. As in transformers, NaN and Infinity may stand in a file; whoever reads a number says which are valid.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

from checkpoint.errors import CheckpointError

# The largest there is, Llama 4's tokenizer.json, has 27 MB; all other files have less than 1 MB. JSON takes up to
# thirty times as much memory as its text.
MAX_BYTES, MAX_SMALL_BYTES = 256 * 2**20, 16 * 2**20
TEMPLATE_FILES = ("chat_template.jinja", "additional_chat_templates/default.jinja")
"""Where a chat template may be as plain text; the first counts."""
_FIX = "download the file again"


def is_there(path: Path) -> bool:
    """Whether there is anything at `path`, be it a link to nowhere; reading it then says what is wrong."""
    return os.path.lexists(path)


def open_regular(path: Path) -> int:
    """A descriptor of the regular file `path`, for reading. Raises CheckpointError."""
    try:
        # Without O_NONBLOCK, opening a FIFO waits for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; copy it from the model's download") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # a name with a zero byte
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is no regular file; copy it from the model's download")
    return descriptor


def read_text(path: Path, most_bytes: int = MAX_SMALL_BYTES) -> str:
    """The text of a checkpoint's file. Raises CheckpointError, with the fix, if it is missing or damaged."""
    with open(open_regular(path), "rb") as file:
        if os.fstat(file.fileno()).st_size > most_bytes:
            raise CheckpointError(f"{path} has more than {most_bytes >> 20} MiB; {_FIX}")
        try:
            data = file.read(most_bytes)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); {_FIX}") from None


def read_json(path: Path, most_bytes: int = MAX_SMALL_BYTES) -> dict[str, Any]:
    """The object in a checkpoint's JSON file. Raises CheckpointError, with the fix, if it is missing or damaged."""
    return parse_json(path, read_text(path, most_bytes))


def parse_json(path: Path, text: str | bytes) -> dict[str, Any]:
    """The object that `text` holds. path: for messages. Raises CheckpointError."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise CheckpointError(f"{path}: not JSON that can be read (nested too deeply); {_FIX}") from None
    except ValueError as error:  # not JSON, not UTF-8, or a number that is too long
        raise CheckpointError(f"{path}: not JSON ({error}); {_FIX}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object; {_FIX}")
    return value

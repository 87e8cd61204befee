"""A folder that belongs to this user alone, with a short path, for what must be in a file system.

Sockets of Ray and HAProxy have paths of at most 97 bytes, and TMPDIR may be long. Names in /tmp
may be another user's. A user may have no home: containers run as any number.
"""

import os
import stat
import tempfile
from pathlib import Path

from checkpoint.errors import DroverError

_LONGEST_TMPDIR = 8
_OTHER_FOLDER = f"set TMPDIR to a folder of your own, of at most {_LONGEST_TMPDIR} letters"


def short_temporary_folder() -> Path:
    """TMPDIR, unless sockets below it would have too long a path."""
    folder = tempfile.gettempdir()
    return Path(folder if len(folder) <= _LONGEST_TMPDIR else "/tmp")


def private_folder() -> Path:
    """drover-UID in the temporary folder, made if needed. Raises DroverError if another user has it."""
    folder = short_temporary_folder() / f"drover-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = os.lstat(folder)
    except OSError as error:
        raise DroverError(f"{folder} cannot be made: {error.strerror}; {_OTHER_FOLDER}") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise DroverError(f"{folder} is not yours; have it removed, or {_OTHER_FOLDER}")
    folder.chmod(0o700)
    return folder


def home() -> Path:
    """The user's home, if there is one that can be written to; else the private folder."""
    named = os.environ.get("HOME", "")
    is_usable = named not in ("", "/") and os.path.isdir(named) and os.access(named, os.W_OK | os.X_OK)
    return Path(named) if is_usable else private_folder()


def ensure_home() -> None:
    """Let HOME name a folder that exists and is this user's: Ray keeps its token there."""
    os.environ["HOME"] = str(home())

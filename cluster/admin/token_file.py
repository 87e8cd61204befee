"""The file with the token of the Admin service: its user's alone."""

import os
import re
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from checkpoint.errors import DroverError
from cluster.private_folder import private_folder

MAX_BYTES = 4096
SHORTEST = 16  # letters


def default_token_file(namespace: str) -> Path:
    """Where the token of a deployment is, unless admin.token_file says otherwise. Raises DroverError."""
    return private_folder() / f"admin-{namespace}.token"


def read_token(path: Path) -> str:
    """The token in the file; a new one if there is no such file. Raises DroverError."""
    try:
        with suppress(FileExistsError):
            _make(path)
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            _check(path, os.fstat(descriptor))
            text = os.read(descriptor, MAX_BYTES).decode("ascii", "replace").strip()
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DroverError(f"admin.token_file {path} cannot be read or made: {error.strerror}") from None
    if not re.fullmatch(rf"[!-~]{{{SHORTEST},}}", text):
        raise DroverError(
            f"admin.token_file {path} must hold one token of at least {SHORTEST} ASCII letters; "
            "remove the file, and a new one is made"
        )
    return text


def _make(path: Path) -> None:
    """Make the file in one step. Raises FileExistsError."""
    if path.exists():
        return
    draft = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
        os.link(draft, path)
    finally:
        os.unlink(draft)


def _check(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise DroverError(f"admin.token_file {path} is not a file")
    if status.st_uid != os.getuid():
        raise DroverError(f"admin.token_file {path} belongs to user {status.st_uid}, not to {os.getuid()}")
    if status.st_mode & 0o077:
        raise DroverError(f"admin.token_file {path} can be read by others; chmod 600 {path}")

"""Writes a checkpoint's directory so that an interrupted writer leaves nothing that loads."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpoint.errors import CheckpointError
from checkpoint.tensor_files import INDEX_FILE

_STAGING = ".partial"
_OUR_FILES = ("config.json", "*.safetensors", INDEX_FILE, "generation_config.json", "tokenizer*.json", "*.jinja")


@contextmanager
def staging_directory(directory: Path, needed_bytes: int, overwrite: bool) -> Iterator[Path]:
    """A directory to write into. Its files move into `directory` at the end, unless the block raises.

    It lies inside `directory`, which may be a mounted volume that cannot be renamed.
    needed_bytes: free space that the disk must have.
    overwrite: replace an existing checkpoint. Files that belong to no checkpoint stay.
    Raises CheckpointError if `directory` is not empty, not writable, too small, or being written
    by another process.
    """
    is_new = not directory.exists()
    lock = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = _lock(directory)
        if not overwrite and any(path.name != _STAGING for path in directory.iterdir()):
            raise CheckpointError(f"{directory} is not empty; name another directory, or ask for --overwrite")
        staging = directory / _STAGING
        shutil.rmtree(staging, ignore_errors=True)  # left by a killed process
        free_bytes = shutil.disk_usage(directory).free
        if needed_bytes > free_bytes:
            raise CheckpointError(
                f"{directory} needs {needed_bytes / 1e9:.2f} GB, its disk has {free_bytes / 1e9:.2f} GB free"
            )
        staging.mkdir()
        try:
            yield staging
            _publish(staging, directory)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error}") from None
    finally:
        if lock is not None:
            os.close(lock)
        if is_new and directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()


def _publish(staging: Path, directory: Path) -> None:
    # The old config.json is removed first and the new one comes last: without it, the directory
    # does not load.
    for pattern in _OUR_FILES:
        for old in directory.glob(pattern):
            old.unlink()
    for new in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
        new.rename(directory / new.name)


def _lock(directory: Path) -> int:
    """Lock the directory against other writers. Returns the descriptor that holds the lock."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CheckpointError(f"{directory} is being written by another process") from None
    except OSError:
        pass  # a file system without locks
    return descriptor

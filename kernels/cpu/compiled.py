"""Compiles inner loops with Numba, and keeps them on disk between runs.

They run without the interpreter's lock.

Numba reads the kept code with pickle. So it is kept only in a directory that no other user can
write; where there is none, every process compiles anew, which takes some seconds.

Numba notices a change in a compiled function's own file, but not in functions inlined from other
files. So the directory's name carries a hash of this folder.
"""

import hashlib
import os
import stat
from functools import partial
from pathlib import Path
from typing import Any

import numba

_config: Any = numba.config
_FOLDER = Path(__file__).parent


def _private_directory() -> Path | None:
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(_FOLDER.glob("*.py")))).hexdigest()[:16]
    try:
        home = _config.CACHE_DIR or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        path = Path(home) / "drover" / f"compiled-{digest}"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
    except (OSError, RuntimeError):
        return None
    is_private = found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return path if is_private and os.access(path, os.W_OK) else None


_DIRECTORY = _private_directory()
if _DIRECTORY is not None:
    _config.CACHE_DIR = str(_DIRECTORY)

compiled = partial(numba.njit, nogil=True, cache=_DIRECTORY is not None, error_model="numpy")
"""The decorator: compiled on first use, for the types it is then called with."""

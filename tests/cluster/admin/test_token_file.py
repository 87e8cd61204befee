"""The Admin service's token: made once, its user's alone, and refused where others can read it."""

import os
import stat
from pathlib import Path

import pytest

from checkpoint.errors import DroverError
from cluster.admin.token_file import read_token


def test_a_token_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "token"
    token = read_token(path)
    assert len(token) >= 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_token(path) == token
    assert [file.name for file in tmp_path.iterdir()] == ["token"]
    assert read_token(tmp_path / "other") != token


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        ("a" * 16, 0o640, "can be read by others; chmod 600 "),
        ("a" * 15, 0o600, "must hold one token of at least 16 ASCII letters"),
        ("", 0o600, "must hold one token"),
        ("a" * 16 + " " + "b" * 16, 0o600, "must hold one token"),
        ("ä" * 16, 0o600, "must hold one token"),
    ],
)
def test_a_file_that_is_no_secret_is_refused(text: str, mode: int, message: str, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(text)
    path.chmod(mode)
    with pytest.raises(DroverError, match=f"^admin.token_file {path} {message}"):
        read_token(path)


def test_what_is_no_file_of_this_user_is_refused(tmp_path: Path) -> None:
    real = tmp_path / "real"
    read_token(real)
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(real)
    os.mkfifo(pipe, 0o600)
    with pytest.raises(DroverError, match="cannot be read or made: Too many levels of symbolic links"):
        read_token(link)
    with pytest.raises(DroverError, match="is not a file"):
        read_token(pipe)
    with pytest.raises(DroverError, match="is not a file"):
        read_token(tmp_path)
    with pytest.raises(DroverError, match="cannot be read or made: No such file"):
        read_token(tmp_path / "nowhere" / "token")

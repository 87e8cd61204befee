"""Machines with long temporary folders, several users, and users without a home."""

import os
import stat
from pathlib import Path

import pytest

from checkpoint.errors import DroverError
from cluster import private_folder


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(private_folder, "short_temporary_folder", lambda: tmp_path)
    return tmp_path


def test_the_folder_is_this_users_alone(temporary: Path) -> None:
    for _ in range(2):
        folder = private_folder.private_folder()
        assert folder == temporary / f"drover-{os.getuid()}"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        folder.chmod(0o777)  # the next call mends it


def test_what_somebody_else_has_put_there_is_refused(temporary: Path) -> None:
    place = temporary / f"drover-{os.getuid()}"
    place.symlink_to("/tmp")
    with pytest.raises(DroverError, match=r"is not yours; have it removed, or set TMPDIR"):
        private_folder.private_folder()
    place.unlink()
    place.write_text("")
    with pytest.raises(DroverError, match=r"cannot be made|is not yours"):
        private_folder.private_folder()


def test_a_long_temporary_folder_is_not_used_for_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/tmp/" + "long" * 40)
    assert private_folder.short_temporary_folder() == Path("/tmp")
    node_id = "0" * 56
    monkeypatch.setattr(os, "getuid", lambda: 2**32 - 2)
    longest = f"/tmp/drover-{os.getuid()}/h{2**22}/{node_id}/a.sock"
    assert len(longest) <= 97


@pytest.mark.parametrize("home", [None, "", "/", "/nowhere/at/all"])
def test_without_a_home_the_private_folder_is_one(
    home: str | None, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if home is None:
        monkeypatch.delenv("HOME")
    else:
        monkeypatch.setenv("HOME", home)
    private_folder.ensure_home()
    assert Path(os.environ["HOME"]) == temporary / f"drover-{os.getuid()}"


def test_a_home_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    private_folder.ensure_home()
    assert os.environ["HOME"] == str(tmp_path)

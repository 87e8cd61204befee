"""Where compiled loops are kept: only where nobody else can put code that this process would then run."""

import shutil
import stat
from pathlib import Path

import pytest

from kernels.cpu import compiled


@pytest.fixture(autouse=True)
def _cache_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiled._config, "CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_a_directory_of_this_user_alone_is_made(tmp_path: Path) -> None:
    directory = compiled._private_directory()
    assert directory is not None
    assert directory.parent == tmp_path / "drover"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert compiled._private_directory() == directory


@pytest.mark.parametrize("mode", [0o770, 0o702], ids=oct)
def test_one_that_others_can_write_is_not_used(mode: int) -> None:
    directory = compiled._private_directory()
    assert directory is not None
    directory.chmod(mode)
    assert compiled._private_directory() is None


def test_without_a_place_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compiled._private_directory() is None


def test_another_version_of_any_file_of_the_folder_is_kept_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Numba notices a change in the file of the function that it compiled, but in none whose functions it inlines."""
    before = compiled._private_directory()
    copy = tmp_path / "cpu"
    shutil.copytree(compiled._FOLDER, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(compiled, "_FOLDER", copy)
    assert compiled._private_directory() == before
    for path in sorted(copy.glob("*.py")):
        text = path.read_text()
        path.write_text(text + "# changed\n")
        assert compiled._private_directory() != before, path.name
        path.write_text(text)

"""Where compiled loops are kept: only where nobody else can put code that this process would then run."""

import stat
from pathlib import Path

import pytest

from experts import compiled


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


def test_another_version_of_what_is_compiled_into_others_is_kept_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    before = compiled._private_directory()
    monkeypatch.setattr(compiled, "_INLINED", compiled._INLINED[1:])
    assert compiled._private_directory() != before


def test_every_file_whose_functions_are_compiled_into_other_files_counts() -> None:
    """Numba notices a change in the file of the function that it compiled, and in no other."""
    root = Path(compiled.__file__).parents[1]
    holders = {
        path.name
        for path in (root / "experts").glob("*.py")
        if any(mark in path.read_text() for mark in ("@njit", "intrinsic(", "@intrinsic", "@overload"))
    }
    assert len(holders) >= 4
    assert holders <= set(compiled._INLINED)

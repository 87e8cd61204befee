"""The notes by which `drover status` and `drover stop` find a deployment's local Ray among several."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local_rays import find_local_ray, forget_local_ray, is_reachable, record_local_ray


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def listening() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_each_namespace_has_its_own(listening: str) -> None:
    record_local_ray("mine", listening)
    assert find_local_ray("mine") == listening
    assert find_local_ray("yours") is None
    assert find_local_ray("min") is None


def test_what_is_forgotten_is_not_found(listening: str) -> None:
    record_local_ray("mine", listening)
    forget_local_ray()
    assert find_local_ray("mine") is None


def test_a_ray_that_is_gone_is_not_found_and_its_note_removed(tmp_path: Path) -> None:
    record_local_ray("mine", "127.0.0.1:1")
    assert find_local_ray("mine") is None
    assert list((tmp_path / ".drover").iterdir()) == []


@pytest.mark.parametrize("address", ["", "auto", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:1", "nonsense.invalid:80"])
def test_what_does_not_answer_is_not_reachable(address: str) -> None:
    assert not is_reachable(address)

"""The notes by which `drover status` and `drover stop` find a deployment's local Ray among several."""

import os
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster import ray_runtime
from cluster.local_rays import find_local_ray, forget_local_ray, haproxy_folder, is_reachable, record_local_ray
from cluster.marked_processes import mark_of_this_process
from tests.command import drover_process
from tests.fake_router import FakeRouter
from tests.loopback import serving


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


def test_a_note_of_a_killed_process_does_not_lead_to_who_has_its_port_now(listening: str, tmp_path: Path) -> None:
    """The process is gone, or its id is another's; its other files go, too."""
    note = tmp_path / ".drover" / f"mine.{os.getpid()}.json"
    record_local_ray("mine", listening)
    folder = haproxy_folder(os.getpid())
    folder.mkdir(parents=True)
    note.write_text(note.read_text().replace(mark_of_this_process(), f"{os.getpid()}-1"))
    assert find_local_ray("mine") is None
    assert not note.exists()
    assert not folder.exists()


def test_a_note_of_another_machine_in_the_same_home_is_kept(listening: str, tmp_path: Path) -> None:
    note = tmp_path / ".drover" / "mine.1.json"
    record_local_ray("mine", listening)
    text = (tmp_path / ".drover" / f"mine.{os.getpid()}.json").read_text()
    forget_local_ray()
    note.write_text(text.replace(socket.gethostname(), "elsewhere").replace(mark_of_this_process(), "1-1"))
    assert find_local_ray("mine") == listening


@pytest.mark.parametrize("text", ["", "[]", "7", "{", '{"address": 7}', '{"address": null}'])
def test_a_damaged_note_is_passed_over(text: str, tmp_path: Path) -> None:
    (tmp_path / ".drover").mkdir()
    (tmp_path / ".drover" / "mine.1.json").write_text(text)
    assert find_local_ray("mine") is None


def test_what_listens_but_is_no_ray_is_told_from_one(listening: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray asked for minutes, and could not be interrupted."""
    monkeypatch.setattr(ray_runtime, "ANSWER_S", 0.3)
    with serving(FakeRouter()) as grpc_server:
        assert not ray_runtime.is_ray(grpc_server)
        assert not ray_runtime.is_ray(listening)
        done = drover_process("stop", "--ray-address", grpc_server)
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch("drover: error: what listens at .* does not answer as a Ray cluster; .*\n", done.stderr)


class WantsToken(grpc.GenericRpcHandler):
    """Answers as the head of a Ray cluster with token authentication does to whoever has none."""

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        def refuse(request: bytes, context: grpc.ServicerContext) -> bytes:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
            raise AssertionError

        return grpc.unary_unary_rpc_method_handler(refuse)


def test_a_token_that_is_missing_is_said_in_one_line(tmp_path: Path) -> None:
    server = grpc.server(ThreadPoolExecutor(4), handlers=[WantsToken()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        named = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
        environment = named | {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}
        done = drover_process("status", "--ray-address", f"127.0.0.1:{port}", env=environment)
    finally:
        server.stop(None)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"drover: error: '127.0.0.1:{port}' refused the connection; if it is a Ray cluster")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("address", ["", "auto", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:1", "nonsense.invalid:80"])
def test_what_does_not_answer_is_not_reachable(address: str) -> None:
    assert not is_reachable(address)

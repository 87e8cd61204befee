"""Failpoints: off, nothing is wrapped; on, each action does what its file says, at its point."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from cluster.actors.failpoints import (
    VARIABLE,
    Failpoints,
    install_in_controller,
    install_in_router,
    install_in_shard,
    of_actor,
)
from cluster.actors.load_progress import LoadProgress
from cluster.actors.placement_keeper import PlacementKeeper
from cluster.actors.router import RouterActor
from cluster.actors.shard import ShardActor
from experts.shard import ExpertShard
from experts.slot_loader import SlotLoader
from router.model.dispatch import Dispatcher
from tests.processes import PATIENCE_S, wait_until

WRAPPED = ((Dispatcher, "dispatch"), (Dispatcher, "combine"), (ExpertShard, "compute"), (LoadProgress, "add_bytes"),
           (ShardActor, "join"), (SlotLoader, "prepare"), (SlotLoader, "retire"), (Dispatcher, "route"),
           (RouterActor, "follow"), (PlacementKeeper, "prepare"), (PlacementKeeper, "commit"),
           (PlacementKeeper, "retire"))  # fmt: skip


class Work:
    def __init__(self) -> None:
        self.done = 0

    def work(self, count: int) -> int:
        self.done += count
        return self.done


@pytest.fixture
def points(tmp_path: Path) -> Failpoints:
    return Failpoints(tmp_path, "shard-1")


@pytest.fixture
def work(points: Failpoints) -> Work:
    own = type("Work", (Work,), {})
    points.wrap(own, "work", "begin", "end")
    made: Work = own()
    return made


def test_off_no_method_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    before = [getattr(owner, name) for owner, name in WRAPPED]
    install_in_router("router-0")
    install_in_shard("shard-0")
    install_in_controller("controller")
    assert [getattr(owner, name) for owner, name in WRAPPED] == before
    assert not any(method.__code__.co_name == "passing" for method in before)


def test_on_every_point_is_wrapped_and_the_process_id_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in WRAPPED:
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back after the test
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    install_in_router("router-0")
    install_in_shard("shard-0")
    install_in_controller("controller")
    assert all(getattr(owner, name).__code__.co_name == "passing" for owner, name in WRAPPED)
    assert (tmp_path / "router-0.pid").read_text() == (tmp_path / "shard-0.pid").read_text() == str(os.getpid())


def test_without_a_file_a_call_is_as_before(work: Work) -> None:
    assert work.work(2) == 2


@pytest.mark.parametrize(("point", "done"), [("begin", 0), ("end", 3)])
def test_a_kill_sends_its_signals_once_and_at_its_point(point: str, done: int, work: Work, tmp_path: Path) -> None:
    file = tmp_path / f"shard-1.{point}"
    seen: list[int] = []
    with subprocess.Popen(["sleep", "60"]) as victim:
        file.write_text(f"kill {victim.pid} {int(signal.SIGKILL)} self {int(signal.SIGUSR1)}")
        before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(work.done))
        try:
            work.work(3)
            work.work(1)
        finally:
            signal.signal(signal.SIGUSR1, before)
            victim.kill()
    assert seen == [done]
    assert victim.returncode == -signal.SIGKILL
    assert not file.exists()
    assert (tmp_path / f"shard-1.{point}.hit").exists()


def test_a_block_lasts_until_its_file_is_gone(work: Work, tmp_path: Path) -> None:
    (tmp_path / "shard-1.begin").write_text("block")
    thread = threading.Thread(target=work.work, args=(1,), daemon=True)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    assert work.done == 0
    (tmp_path / "shard-1.begin").unlink()
    thread.join(PATIENCE_S)
    assert work.done == 1


def test_a_slow_call_takes_so_many_times_as_long(points: Failpoints, tmp_path: Path) -> None:
    slept: list[float] = []

    class Slow:
        def work(self) -> None:
            began_s = time.perf_counter()
            wait_until(lambda: time.perf_counter() - began_s > 0.005)

    points.wrap(Slow, "work", "begin")
    for factor in (None, 10):
        if factor:
            (tmp_path / "shard-1.begin").write_text(f"slow {factor}")
        began_s = time.perf_counter()
        Slow().work()
        slept.append(time.perf_counter() - began_s)
    assert slept[1] > 10 * 0.005
    assert slept[0] < slept[1]


def test_a_start_is_a_point_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    (tmp_path / "controller.start").write_text("kill")
    assert of_actor("controller") is not None
    assert (tmp_path / "controller.start.hit").exists()
    assert (tmp_path / "controller.pid").read_text() == str(os.getpid())

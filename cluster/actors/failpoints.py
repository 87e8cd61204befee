"""Named points in an actor at which the fault bench kills, blocks or slows processes.

Without the environment variable DROVER_FAILPOINTS nothing of this exists in an actor: no wrapper,
and no test in any call. The variable names a folder. An actor that starts with it writes its
process id to FOLDER/NAME.pid and wraps the methods of its points. Each call of a wrapped method
then looks for the file FOLDER/NAME.POINT, which holds one action:

    kill PID SIGNAL [PID SIGNAL ...]   send these signals, once; the file is renamed to *.hit.
                                       "self" is the actor's own process
    block                              wait until the file is gone
    slow FACTOR                        the call takes FACTOR times as long while the file is there

Points of a router: start, load, dispatch, dispatched (between dispatch and combine), combine,
drain (before it follows new orders), commit (before it takes another placement). Of a shard: start,
load, join, compute, computed (before the answer is sent), prepare (before it is to hold more), retire
(before it lets go). Of the controller: start, prepare (before it tells shards of a step), commit and
retire (before it stores them).

Whoever starts a deployment with the variable hands it on to all parts.
"""

import os
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

VARIABLE = "DROVER_FAILPOINTS"
# A blocked thread looks so often whether it may go on. Nothing tells it: the file is another process's.
# Rarely: a thread that uses a hundredth of a processor does not count as stuck.
_LOOK_S = 0.1


def environment() -> dict[str, str]:
    """What the processes of all parts need to have the points, too; nothing if they are off."""
    folder = os.environ.get(VARIABLE)
    return {VARIABLE: folder} if folder else {}


class Failpoints:
    """The points of one actor."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name

    def hit(self, point: str) -> None:
        """Do what the point's file says, if there is one."""
        file = self._file(point)
        action = _read(file)
        if action[:1] == ["kill"]:
            try:
                os.rename(file, f"{file}.hit")
            except FileNotFoundError:
                return  # another thread was faster
            for process_id, number in zip(action[1::2], action[2::2], strict=True):
                os.kill(os.getpid() if process_id == "self" else int(process_id), int(number))
        elif action[:1] == ["block"]:
            while os.path.exists(file):
                time.sleep(_LOOK_S)

    def wrap(self, owner: type, method: str, before: str, after: str | None = None) -> None:
        """Let each call of the method pass the point `before`, and on its way out `after`."""
        original: Callable[..., Any] = getattr(owner, method)

        @wraps(original)
        def passing(*arguments: Any, **named: Any) -> Any:
            self.hit(before)
            began_s = time.perf_counter()
            result = original(*arguments, **named)
            action = _read(self._file(before))
            if action[:1] == ["slow"]:
                time.sleep((float(action[1]) - 1) * (time.perf_counter() - began_s))
            if after is not None:
                self.hit(after)
            return result

        setattr(owner, method, passing)

    def _file(self, point: str) -> str:
        return f"{self._folder}/{self._name}.{point}"


def of_actor(name: str) -> Failpoints | None:
    """The points of the actor `name` if they are on. It passes `start` and tells its process id."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return None
    points = Failpoints(Path(folder), name)
    partial = Path(folder) / f"{name}.pid.{os.getpid()}"
    partial.write_text(str(os.getpid()))
    partial.rename(Path(folder) / f"{name}.pid")
    points.hit("start")
    return points


def install_in_router(name: str) -> None:
    """Turn on the points of a router's process, if the environment says so."""
    if (points := of_actor(name)) is not None:
        from cluster.actors.load_progress import LoadProgress
        from cluster.actors.router import RouterActor
        from router.model.dispatch import Dispatcher

        points.wrap(Dispatcher, "dispatch", "dispatch", "dispatched")
        points.wrap(Dispatcher, "combine", "combine")
        points.wrap(Dispatcher, "route", "commit")
        points.wrap(LoadProgress, "add_bytes", "load")
        points.wrap(RouterActor, "follow", "drain")


def install_in_shard(name: str) -> None:
    """Turn on the points of a shard's process, if the environment says so."""
    if (points := of_actor(name)) is not None:
        from cluster.actors.load_progress import LoadProgress
        from cluster.actors.shard import ShardActor
        from experts.shard import ExpertShard
        from experts.slot_loader import SlotLoader

        points.wrap(ExpertShard, "compute", "compute", "computed")
        points.wrap(LoadProgress, "add_bytes", "load")
        points.wrap(ShardActor, "join", "join")
        points.wrap(SlotLoader, "prepare", "prepare")
        points.wrap(SlotLoader, "retire", "retire")


def install_in_controller(name: str) -> None:
    """Turn on the points of the controller's process, if the environment says so."""
    if (points := of_actor(name)) is not None:
        from cluster.actors.placement_keeper import PlacementKeeper

        for point in ("prepare", "commit", "retire"):
            points.wrap(PlacementKeeper, point, point)


def _read(file: str) -> list[str]:
    try:
        with open(file) as opened:
            return opened.read().split()
    except FileNotFoundError:
        return []

"""The actors as Ray knows them have just the methods of the classes behind them."""

import inspect
from typing import Any

import pytest

from cluster.actors.link_invitation import LinkInvitation
from cluster.actors.remote import RemoteRouter, RemoteShard
from cluster.actors.router import RouterActor, RouterSpec
from cluster.actors.shard import ShardActor, ShardSpec

# remote.py imports these for type checkers alone.
TYPES = {cls.__name__: cls for cls in (LinkInvitation, RouterSpec, ShardSpec)}


def methods(cls: type) -> dict[str, tuple[inspect.Signature, bool]]:
    """The public methods and the constructor: signatures, and whether calls are awaited."""
    found: dict[str, Any] = dict(inspect.getmembers(cls, inspect.isfunction))
    return {
        name: (inspect.signature(method, eval_str=True, locals=TYPES), inspect.iscoroutinefunction(method))
        for name, method in found.items()
        if name == "__init__" or not name.startswith("_")
    }


@pytest.mark.parametrize(("remote", "actor"), [(RemoteRouter, RouterActor), (RemoteShard, ShardActor)])
def test_a_remote_class_has_the_methods_of_its_actor(remote: type, actor: type) -> None:
    assert methods(remote) == methods(actor)
    assert len(methods(remote)) > 1

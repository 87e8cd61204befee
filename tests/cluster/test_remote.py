"""The actors as Ray knows them have just the methods of the classes behind them."""

import ast
import inspect

import pytest

from cluster.actors.controller import ControllerActor
from cluster.actors.remote import RemoteController, RemoteRouter, RemoteShard
from cluster.actors.router import RouterActor
from cluster.actors.shard import ShardActor


def methods(cls: type) -> dict[str, tuple[str, ...]]:
    """The public methods and the constructor: whether they are awaited, and their signatures.

    Read from the source, because Ray changes the signatures of a class that became an actor.
    remote.py quotes the types that it imports for type checkers alone.
    """
    [definition] = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    return {
        node.name: (type(node).__name__, *(ast.unparse(part).replace("'", "") for part in (node.args, node.returns)))
        for node in definition.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.returns is not None
        and (node.name == "__init__" or not node.name.startswith("_"))
    }


@pytest.mark.parametrize(
    ("remote", "actor"), [(RemoteRouter, RouterActor), (RemoteShard, ShardActor), (RemoteController, ControllerActor)]
)
def test_a_remote_class_has_the_methods_of_its_actor(remote: type, actor: type) -> None:
    assert methods(remote) == methods(actor)
    assert len(methods(remote)) > 1

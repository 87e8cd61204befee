"""What is wanted of a deployment, kept by Ray's head: it lives as long as Ray's own records of the actors.

The placement is not in here.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from ray.experimental import internal_kv

from cluster.names import app_name
from cluster.policy.wanted import Before, Resize, Wanted

_FIELDS = ("routers", "shards", "drained", "cleared", "released", "replicas", "frontends")


def read_wanted(namespace: str, begun_with: Wanted) -> tuple[Wanted, frozenset[str]]:
    """What was stored last, and the parts that were created outside their bundle; `begun_with` if nothing was."""
    stored = internal_kv._internal_kv_get(_key(namespace))
    return from_json(stored, begun_with) if stored else (begun_with, frozenset())


def write_wanted(namespace: str, wanted: Wanted, moved: Iterable[str]) -> None:
    """Replace what was stored."""
    internal_kv._internal_kv_put(_key(namespace), to_json(wanted, moved))


def forget_wanted(namespace: str) -> None:
    """The deployment has ended: another in its namespace starts with its own parts."""
    internal_kv._internal_kv_del(_key(namespace))


def to_json(wanted: Wanted, moved: Iterable[str]) -> str:
    told: dict[str, Any] = {name: getattr(wanted, name) for name in _FIELDS}
    told["resize"] = None if wanted.resize is None else asdict(wanted.resize)
    return json.dumps(told | {"moved": sorted(moved)})


def from_json(stored: str | bytes, begun_with: Wanted) -> tuple[Wanted, frozenset[str]]:
    told = json.loads(stored)
    told |= {kind: tuple(told[kind]) for kind in ("routers", "shards")}
    if told["resize"] is not None:
        before = told["resize"].pop("before")
        before |= {kind: tuple(before[kind]) for kind in ("routers", "shards")}
        told["resize"] = Resize(**told["resize"], before=Before(**before))
    moved = frozenset(told.pop("moved"))
    return replace(begun_with, **told), moved


def _key(namespace: str) -> str:
    return f"{app_name(namespace)}.wanted"

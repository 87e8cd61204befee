"""What is drained in a deployment, kept by Ray's head: it lives as long as Ray's own records of the actors."""

import json
from dataclasses import asdict, dataclass, field

from ray.experimental import internal_kv

from cluster.names import app_name


@dataclass(frozen=True)
class StoredDrains:
    """drained, cleared: parts and ids of nodes, with grace_s (cluster/policy/wanted.py).

    moved: parts that were created outside their bundle of the placement group.
    """

    drained: dict[str, float] = field(default_factory=dict)
    cleared: dict[str, float] = field(default_factory=dict)
    moved: list[str] = field(default_factory=list)


def read_drains(namespace: str) -> StoredDrains:
    """What was stored last."""
    stored = internal_kv._internal_kv_get(_key(namespace))
    return StoredDrains(**json.loads(stored)) if stored else StoredDrains()


def write_drains(namespace: str, drains: StoredDrains) -> None:
    """Replace what was stored."""
    internal_kv._internal_kv_put(_key(namespace), json.dumps(asdict(drains)))


def forget_drains(namespace: str) -> None:
    """The deployment has ended: another in its namespace starts with all its parts."""
    internal_kv._internal_kv_del(_key(namespace))


def _key(namespace: str) -> str:
    return f"{app_name(namespace)}.drains"

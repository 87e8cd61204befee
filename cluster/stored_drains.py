"""What is drained in a deployment, kept by Ray's head: it lives as long as Ray's own records of the actors."""

import json
from collections.abc import Mapping

from ray.experimental import internal_kv

from cluster.names import app_name


def read_drains(namespace: str) -> tuple[dict[str, float], dict[str, float]]:
    """grace_s of drained parts and of cleared nodes; see cluster/policy/wanted.py."""
    stored = internal_kv._internal_kv_get(_key(namespace))
    drained, cleared = json.loads(stored) if stored else ({}, {})
    return drained, cleared


def write_drains(namespace: str, drained: Mapping[str, float], cleared: Mapping[str, float]) -> None:
    """Replace what was stored."""
    internal_kv._internal_kv_put(_key(namespace), json.dumps([dict(drained), dict(cleared)]))


def forget_drains(namespace: str) -> None:
    """The deployment has ended: another in its namespace starts with all its parts."""
    internal_kv._internal_kv_del(_key(namespace))


def _key(namespace: str) -> str:
    return f"{app_name(namespace)}.drains"

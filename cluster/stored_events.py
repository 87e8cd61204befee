"""A deployment's events, kept by Ray's head: they outlive the controller's process."""

from ray.experimental import internal_kv

from cluster.names import app_name


def read_events(namespace: str) -> str:
    """What was stored last; empty if nothing was."""
    stored = internal_kv._internal_kv_get(_key(namespace))
    return stored.decode() if stored else ""


def write_events(namespace: str, events: str) -> None:
    """Replace what was stored."""
    internal_kv._internal_kv_put(_key(namespace), events)


def forget_events(namespace: str) -> None:
    """The deployment has ended."""
    internal_kv._internal_kv_del(_key(namespace))


def _key(namespace: str) -> str:
    return f"{app_name(namespace)}.events"

"""Whether autoscaling was paused or resumed at run time, kept by Ray's head."""

from ray.experimental import internal_kv

from cluster.names import app_name


def read_is_paused(namespace: str) -> bool | None:
    """What was stored last; None if nothing was."""
    stored = internal_kv._internal_kv_get(_key(namespace))
    return stored == b"paused" if stored else None


def write_is_paused(namespace: str, is_paused: bool) -> None:
    """Replace what was stored."""
    internal_kv._internal_kv_put(_key(namespace), "paused" if is_paused else "on")


def forget_is_paused(namespace: str) -> None:
    """The deployment has ended."""
    internal_kv._internal_kv_del(_key(namespace))


def _key(namespace: str) -> str:
    return f"{app_name(namespace)}.autoscaling"

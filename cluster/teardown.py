"""Removes a deployment from Ray: the Serve application, the actors and the placement group."""

from typing import Any

import ray
from ray import serve
from ray.util.placement_group import remove_placement_group

from cluster.config import DeploymentConfig
from cluster.names import actor_names, app_name
from cluster.stored_autoscaling import forget_is_paused
from cluster.stored_events import forget_events
from cluster.stored_placement import forget_placement
from cluster.stored_wanted import forget_wanted


def end(config: DeploymentConfig) -> None:
    """Remove what `launch.start` created.

    With a local Ray there is nothing to do: all of it ends with that Ray.
    """
    if config.ray.address != "local":
        stop(config.ray.namespace)


def stop(namespace: str) -> list[str]:
    """Remove the Serve application, actors and placement group of `namespace`.

    Returns the names of removed parts.
    """
    removed = []
    if app_name(namespace) in serve_applications():
        serve.shutdown()
        removed.append("frontend")
    for name in actor_names(namespace):  # the controller first: it would create the others again
        try:
            ray.kill(ray.get_actor(name, namespace=namespace))
            removed.append(name)
        except ValueError:
            pass  # it ended in the meantime
    forget(namespace)
    group = _find_group(namespace)
    if group is not None:
        remove_placement_group(group)
    return removed


def forget(namespace: str) -> None:
    """Forget all that a deployment's controller has stored. What it was about to store as it ended may come after."""
    forget_wanted(namespace)
    forget_events(namespace)
    forget_is_paused(namespace)
    forget_placement(namespace)


def serve_applications() -> list[str]:
    """Names of the Serve applications on this Ray cluster."""
    try:
        return list(serve.status().applications)
    except (RuntimeError, ray.exceptions.RayError):
        return []


def _find_group(namespace: str) -> Any:
    try:
        return ray.util.get_placement_group(app_name(namespace))
    except ValueError:
        return None

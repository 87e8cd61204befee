"""Lets a deployment's running requests end before it is removed."""

import time
from collections.abc import Callable

import ray
from ray import serve

from checkpoint.errors import DroverError
from cluster.config import DeploymentConfig
from cluster.controller_client import ControllerClient
from cluster.names import app_name

LOOK_S = 0.1


def finish_requests(config: DeploymentConfig, tell: Callable[[str], None]) -> None:
    """Refuse new requests, and return once those that run have ended, after frontend.grace_s at most.

    Does not fail: what cannot be waited for is told. May block for longer while Ray's head is away.
    """
    try:
        if _wait_for_routers(config, tell):
            serve.delete(app_name(config.ray.namespace))  # the last tokens are on their way to clients
    except (DroverError, ray.exceptions.RayError) as error:
        tell(f"running requests are not waited for: {error}")


def _wait_for_routers(config: DeploymentConfig, tell: Callable[[str], None]) -> bool:
    """Whether there was something to wait for."""
    grace_s = config.frontend.grace_s
    deadline_s = time.monotonic() + grace_s
    controller = ControllerClient(config.ray.namespace, grace_s)
    has_waited = False
    while not (progress := controller.stop_serving()).is_done and time.monotonic() < deadline_s:
        if progress.left and not has_waited:
            has_waited = True
            left = "; ".join(f"{router} finishes {what}" for router, what in progress.left.items())
            tell(f"{left}, within {grace_s:g} s; the same signal again ends them")
        time.sleep(LOOK_S)
    return has_waited

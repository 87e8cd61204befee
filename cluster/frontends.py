"""How many frontend replicas Ray Serve runs."""

from typing import Any

import ray
from ray.serve._private.common import DeploymentID
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

from cluster.names import app_name

ANSWER_S = 3.0
FRONTEND = "Frontend"
"""The name of the Serve deployment: that of its class."""


def scale_frontends(namespace: str, count: int) -> bool:
    """Have Serve run so many; whether they run. To be asked until they do.

    Serve starts new replicas beside the others, and lets those that go finish. Raises what Ray raises.
    """
    controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    details: Any = ray.get(controller.get_serve_instance_details.remote(), timeout=ANSWER_S)
    frontend = details["applications"][app_name(namespace)]["deployments"][FRONTEND]
    if frontend["target_num_replicas"] != count:
        deployment = DeploymentID(name=FRONTEND, app_name=app_name(namespace))
        ray.get(controller.update_deployment_replicas.remote(deployment, count), timeout=ANSWER_S)
        return False
    states = [replica["state"] for replica in frontend["replicas"]]
    return states == ["RUNNING"] * count

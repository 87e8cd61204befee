"""How many frontend replicas Ray Serve runs."""

import ray
from ray import serve
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
    deployment = DeploymentID(name=FRONTEND, app_name=app_name(namespace))
    controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    ray.get(controller.update_deployment_replicas.remote(deployment, count), timeout=ANSWER_S)
    states = serve.status().applications[deployment.app_name].deployments[FRONTEND].replica_states
    return {state: number for state, number in states.items() if number} == {"RUNNING": count}

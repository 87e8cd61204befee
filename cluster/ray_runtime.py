"""This process's connection to Ray: a Ray of its own, or a running cluster."""

import logging
import os

import ray

from checkpoint.errors import DroverError
from cluster.config import RayConfig
from cluster.free_ports import free_serve_ports
from cluster.local_rays import forget_local_ray, is_reachable, record_local_ray

# Drover keeps tensors out of Ray's object store; only control messages and token batches go through it.
OBJECT_STORE_BYTES = 200 * 10**6
_START_RAY = 'start one (`ray start --head`), or serve with ray.address: "local"'


class NoRay(DroverError):
    """There is no Ray cluster where one was looked for."""


def connect(config: RayConfig) -> None:
    """Start a local Ray, or join the cluster at config.address. Raises DroverError if there is none.

    A process that is connected already stays where it is. With a local Ray, `disconnect` ends it and everything on it.
    """
    if ray.is_initialized():
        return
    # HAProxy makes gRPC streaming through Serve about ten times faster than Serve's Python proxy (9,000-34,000
    # messages/s against 1,100-3,700 on 2 cores). On a running cluster its nodes must have been started with it.
    os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    _mute_raylet()
    common = {"namespace": config.namespace, "log_to_driver": False, "logging_level": logging.ERROR}
    if config.address == "local":
        os.environ.update(_serve_ports())
        context = ray.init(
            "local",
            num_cpus=config.num_cpus,
            num_gpus=config.num_gpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            **common,
        )
        record_local_ray(config.namespace, context.address_info["gcs_address"])
        return
    address = _address_of_this_machine() if config.address == "auto" else config.address
    if not is_reachable(address):
        raise NoRay(f"no Ray cluster answers at {address!r}; {_START_RAY}")
    try:
        ray.init(address, **common)
    except ConnectionError:
        raise DroverError(
            f"what listens at {address!r} does not let this process in; a Ray cluster asks for its token: set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as on its head node"
        ) from None


def disconnect() -> None:
    """Leave the cluster; a local Ray ends."""
    ray.shutdown()
    forget_local_ray()


def _mute_raylet() -> None:
    """Keep the raylet's remarks off the terminal, such as one on Serve's own controller at every shutdown.

    log_to_driver=False covers the actors' logs only. What concerns the user reaches them as an exception; the remarks
    stay in Ray's logs.
    """

    def discard(data: object, ignore_prefix: bool) -> None:
        pass

    ray._private.worker.print_to_stdstream = discard


def _address_of_this_machine() -> str:
    """What "auto" stands for: RAY_ADDRESS, or where the last `ray start` on this machine said that it is.

    Ray itself would look for processes too, and would wait for minutes for a cluster that is gone.
    """
    address = os.environ.get("RAY_ADDRESS") or ray._private.utils.read_ray_address()
    if not address or not is_reachable(address):
        raise NoRay(f"no Ray cluster runs on this machine; {_START_RAY}")
    return str(address)


def _serve_ports() -> dict[str, str]:
    """Free ports for what Serve opens besides the configured ones.

    Serve gives its replicas and HAProxy the same fixed ports on every cluster. Replicas open them shared, so with two
    clusters on one machine the kernel would hand each a part of the other's requests.
    """
    per_protocol = 24
    base = free_serve_ports(4 + 2 * per_protocol)[0]
    single = ("FALLBACK_PROXY_HTTP", "FALLBACK_PROXY_GRPC", "HAPROXY_STATS", "HAPROXY_METRICS")
    ports = {f"RAY_SERVE_{name}_PORT": base + index for index, name in enumerate(single)}
    for index, protocol in enumerate(("HTTP", "GRPC")):
        first = base + len(single) + index * per_protocol
        ports[f"RAY_SERVE_DIRECT_INGRESS_MIN_{protocol}_PORT"] = first
        ports[f"RAY_SERVE_DIRECT_INGRESS_MAX_{protocol}_PORT"] = first + per_protocol - 1
    return {name: str(port) for name, port in ports.items()}

"""Connects this process to Ray: starts a local one, or joins a running cluster."""

import logging
import os
from collections.abc import Callable

import grpc
import ray

from checkpoint.errors import DroverError
from cluster.config import RayConfig
from cluster.free_ports import free_serve_ports
from cluster.local_rays import forget_local_ray, haproxy_folder, is_reachable, record_local_ray
from cluster.private_folder import ensure_home, short_temporary_folder

# Small: tensors never go through Ray's object store, only control messages and token batches do.
OBJECT_STORE_BYTES = 200 * 10**6
ENVIRONMENT = {
    # A busy machine is slow, not broken: Ray gives a node 30 s to start and Serve's proxy 3 x 5 s.
    "RAY_raylet_start_wait_time_s": "120",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    # HAProxy comes back in 0.1 s should it die, and in 3 s should the actor around it. By default
    # Serve notices either after 20 to 30 s.
    "RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH": "cluster.serve_callback.use_own_haproxy_manager",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.25",
}
"""For Ray and Serve, if the caller has not set them. Nodes of a running cluster need them, too."""
ANSWER_S = 15.0
"""How long Ray's head may take to answer, on a busy machine."""
_START_RAY = 'start one (`ray start --head`), or serve with ray.address: "local"'


class RayDidNotStart(DroverError):
    """A local Ray could not be started; on a busy machine another try may do."""


class NoRay(DroverError):
    """No Ray cluster answers at the address."""


def connect(config: RayConfig) -> None:
    """Start a local Ray, or join the cluster at config.address. Raises DroverError if there is none.

    Does nothing if this process is connected already. `disconnect` ends a local Ray and everything
    in it.
    """
    if ray.is_initialized():
        return
    # With HAProxy, gRPC streams through Serve are about ten times as fast as with Serve's Python
    # proxy: 9,000-34,000 messages/s against 1,100-3,700 on 2 cores. The nodes of a running cluster
    # must be started with the same setting.
    os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    _mute_raylet()
    ensure_home()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    common = {"namespace": config.namespace, "log_to_driver": False, "logging_level": logging.ERROR}
    if config.address == "local":
        os.environ.update(_serve_ports() | _serve_files())
        local = {"num_cpus": config.num_cpus, "num_gpus": config.num_gpus, "include_dashboard": False}
        folder = str(short_temporary_folder() / "ray")
        try:
            context = ray.init("local", _temp_dir=folder, object_store_memory=OBJECT_STORE_BYTES, **local, **common)
        except Exception as error:  # Ray's own are of many classes
            ray.shutdown()
            raise RayDidNotStart(
                f"Ray could not start on this machine: {_one_line(error)}; its logs: {folder}"
            ) from None
        record_local_ray(config.namespace, context.address_info["gcs_address"])
        return
    address = _address_of_this_machine() if config.address == "auto" else config.address
    if not is_reachable(address):
        raise NoRay(f"no Ray cluster answers at {address!r}; {_START_RAY}")
    if not is_ray(address):
        raise NoRay(f"what listens at {address!r} does not answer as a Ray cluster; {_START_RAY}")
    try:
        ray.init(address, **common)
    except (ConnectionError, ray.exceptions.AuthenticationError):
        raise DroverError(
            f"{address!r} refused the connection; if it is a Ray cluster with token authentication, set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as on its head node"
        ) from None


def is_ray(address: str) -> bool:
    """Whether the head of a Ray cluster listens at host:port. Ray itself would ask for minutes."""
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return True  # only Ray knows how to ask
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        ask: Callable[..., bytes] = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        try:
            ask(b"", timeout=ANSWER_S)
        except grpc.RpcError as error:
            return error.code() is grpc.StatusCode.UNAUTHENTICATED  # its token is for later
    return True


def disconnect() -> None:
    """Leave the cluster. A local Ray ends."""
    ray.shutdown()
    forget_local_ray()


def fault() -> str | None:
    """Why Ray no longer works, or None: a process of the local Ray has died, or the cluster's head does not answer."""
    node = ray._private.worker._global_node
    dead = [] if node is None else [kind for kind, _ in node.dead_processes()]
    if dead:
        return f"Ray's {' and '.join(dead)} died; its logs: {node.get_logs_dir_path()}"
    if not is_reachable(ray.get_runtime_context().gcs_address):
        return f"Ray's head at {ray.get_runtime_context().gcs_address} does not answer any more"
    return None


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _mute_raylet() -> None:
    """Keep the raylet's messages off the terminal, such as one about Serve's controller at every shutdown.

    log_to_driver=False silences the actors' logs only. Errors still reach the user as exceptions,
    and all messages stay in Ray's logs.
    """

    def discard(data: object, ignore_prefix: bool) -> None:
        pass

    ray._private.worker.print_to_stdstream = discard


def _address_of_this_machine() -> str:
    """The address for "auto": RAY_ADDRESS, or the one that the last `ray start` on this machine recorded.

    Ray's own search also looks for processes, and waits minutes for a cluster that is gone.
    """
    address = os.environ.get("RAY_ADDRESS") or ray._private.utils.read_ray_address()
    if not address or not is_reachable(address):
        raise NoRay(f"no Ray cluster runs on this machine; {_START_RAY}")
    return str(address)


def _serve_files() -> dict[str, str]:
    """Environment variables with paths for HAProxy: by default they are one folder for all users of a machine.

    In it is HAProxy's admin socket, which anybody may use who reaches it. The folder's name has this
    process's id, so that a HAProxy that outlives its Ray can be told from others.
    """
    folder = haproxy_folder(os.getpid())
    folder.mkdir(mode=0o700, exist_ok=True)
    files = {"CONFIG_FILE_LOC": "haproxy.cfg", "SOCKET_PATH": "a.sock", "SERVER_STATE_FILE": "server-state"}
    paths = {f"RAY_SERVE_HAPROXY_{name}": str(folder / file) for name, file in files.items()}
    return paths | {"RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder)}


def _serve_ports() -> dict[str, str]:
    """Environment variables with free ports for what Serve opens besides the configured ports.

    By default Serve uses the same fixed ports on every cluster, and replicas open them shared.
    With two clusters on one machine, the kernel would send some requests to the wrong cluster.
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

"""Starts a deployment: placement group, detached named actors, links, and the Serve application."""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, Protocol

import ray
from ray import serve
from ray.serve.config import HTTPOptions, gRPCOptions
from ray.util.placement_group import placement_group

from checkpoint.errors import DroverError
from checkpoint.tensors import Checkpoint
from checkpoint.tokenizer import Tokenizer
from client import Client, ClientError
from cluster import ray_runtime
from cluster.actors import failpoints
from cluster.actors.controller import ControllerSpec
from cluster.actors.creation import MIN_CPUS, Blueprint
from cluster.actors.remote import RemoteController
from cluster.actors.specs import expert_bytes, frontend_spec, placement, scaling, slots
from cluster.addresses import split_address
from cluster.admin.server import AdminSettings
from cluster.blueprints import blueprints_of, nodes_of_bundles
from cluster.config import ConfigError, DeploymentConfig
from cluster.local_rays import forget_gone_rays
from cluster.marked_processes import end_left_over
from cluster.names import CONTROLLER, actor_names, app_name
from cluster.reports import ActorState, Phase
from cluster.serve_app import GRPC_SERVICER_FUNCTIONS, build
from cluster.teardown import end, forget, serve_applications
from frontend.chat_template import ChatTemplate

# Actors and Serve are polled at this interval: Ray sends no notification when they are ready or gone.
POLL_S = 0.1
ROOM_TIMEOUT_S = 30.0
# A node that starts on a busy machine may miss deadlines of Ray's own.
RAY_ATTEMPTS = 3
HEALTH_TIMEOUT_S = 5.0


class StartError(DroverError):
    """The deployment could not be started; nothing of it is left running.

    The message names the part and the cause.
    """


class Progress(Protocol):
    """Receives the progress of a start."""

    def stage(self, text: str) -> None:
        """A new stage begins, such as "starting Ray"."""
        ...

    def loading(self, name: str, state: ActorState | None) -> None:
        """Loading state of the actor `name`; None until its process answers."""
        ...


@dataclass(frozen=True)
class Deployment:
    """A running deployment. start_s: seconds from creating the actors until the model answers."""

    config: DeploymentConfig
    address: str
    start_s: float


def start(config: DeploymentConfig, progress: Progress) -> Deployment:
    """Connect to Ray and start the deployment. Returns once the model answers over gRPC.

    Raises DroverError. What was started on a running cluster is removed first. A local Ray is not:
    the caller ends it, with everything in it, by `ray_runtime.disconnect`.
    """
    if config.ray.address == "local":
        end_left_over()  # a HAProxy among them may have the port
        forget_gone_rays()
    checkpoint = check(config)
    for warning in checkpoint.warnings:
        progress.stage(f"note: {warning}")
    if "cuda" in (config.router.device, config.shards.device):
        progress.stage('note: on CUDA and over NCCL Drover was never run yet; see "Limits" in README.md')
    progress.stage("starting Ray" if config.ray.address == "local" else "joining the Ray cluster")
    deadline = time.monotonic() + config.start_timeout_s
    _connect(config, progress, deadline)
    _check_nothing_runs(config)
    forget(config.ray.namespace)  # what an earlier deployment has left, however it ended
    try:
        progress.stage("reserving CPUs and GPUs")
        group = _reserve(config)
        began = time.monotonic()
        blueprints = blueprints_of(config, checkpoint, group)
        actors = {blueprint.name: blueprint.create(group) for blueprint in blueprints}
        progress.stage("opening the gRPC port")
        _start_frontend(config, checkpoint)  # meanwhile the actors start and read their weights
        progress.stage("loading weights")
        _wait_for_weights(actors, progress, deadline)
        progress.stage("linking routers to shards")
        for name, actor in actors.items():
            if name.startswith("router-"):
                _wait_until(partial(_unready_reason, actor), deadline, f"{name} is not ready")
        host = config.frontend.host
        address = f"{f'[{host}]' if ':' in host else host}:{config.frontend.grpc_port}"
        _wait_until(lambda: _not_serving(address), deadline, f"gRPC on {address} does not answer")
        start_s = time.monotonic() - began
        _create_controller(config, checkpoint, group, blueprints)  # last: what dies in a start fails the start
    except BaseException as error:
        end(config)
        if isinstance(error, ray.exceptions.RayError):
            raise StartError(f"Ray failed: {_first_line(error)}") from error
        raise
    return Deployment(config, address, start_s)


def _connect(config: DeploymentConfig, progress: Progress, deadline: float) -> None:
    for attempt in range(RAY_ATTEMPTS - 1, -1, -1):
        try:
            ray_runtime.connect(config.ray)
        except ray_runtime.RayDidNotStart as error:
            if attempt == 0 or time.monotonic() > deadline:
                raise
            progress.stage(f"note: {error}; trying again")
        else:
            return


def check(config: DeploymentConfig) -> Checkpoint:
    """Check the checkpoint, the config and the ports before anything is started.

    Raises DroverError.
    """
    checkpoint = Checkpoint.open(config.checkpoint)
    Tokenizer.open(config.checkpoint)
    ChatTemplate.open(config.checkpoint)
    shards, experts = config.shards.count, checkpoint.config.num_experts
    if shards and not experts:
        raise ConfigError(f"shards.count is {shards}; this model is dense, without routed experts: set it to 0")
    if shards > experts or (experts and not shards):
        raise ConfigError(
            f"shards.count is {shards}; the model has {experts} experts, so it must be from 1 to {experts}"
        )
    needed = placement(config, checkpoint, None).most_per_layer + 1
    if config.shards.slots is not None and config.shards.slots < needed:
        raise ConfigError(
            f"shards.slots is {config.shards.slots}; {shards} shards with placement.replicas "
            f"{config.placement.replicas} begin with {needed - 1} experts of a layer each, and one slot is for moving "
            f"experts: set it to at least {needed}"
        )
    if _ray_is_on_this_machine(config.ray.address):
        _check_ports(config)
    return checkpoint


def _check_nothing_runs(config: DeploymentConfig) -> None:
    running = actor_names(config.ray.namespace)
    if running:
        raise StartError(
            f"{', '.join(running)} already run in namespace {config.ray.namespace!r}; "
            f"`drover stop --namespace {config.ray.namespace}` removes them, or choose another ray.namespace"
        )
    if serve_applications():
        raise StartError("Ray Serve already runs applications on this Ray cluster; Drover needs a Serve of its own")


def _ray_is_on_this_machine(address: str) -> bool:
    if address in ("local", "auto"):
        return True
    host, _ = split_address(address)
    with socket.socket(_family(host)) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True


def _check_ports(config: DeploymentConfig) -> None:
    frontend = config.frontend
    for key, port in (("frontend.grpc_port", frontend.grpc_port), ("frontend.http_port", frontend.http_port)):
        with socket.socket(_family(frontend.host)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((frontend.host, port))
            except OSError as error:
                raise StartError(
                    f"{key} is {port}, which cannot be opened on {frontend.host}: {error.strerror}; "
                    "choose a free port, or stop what listens there"
                ) from None


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _bundles(config: DeploymentConfig) -> list[dict[str, float]]:
    parts = [config.router] * config.router.count + [config.shards] * config.shards.count
    return [{"CPU": max(part.cpus, MIN_CPUS)} | ({"GPU": part.gpus} if part.gpus else {}) for part in parts]


def _reserve(config: DeploymentConfig) -> Any:
    bundles, total = _bundles(config), ray.cluster_resources()
    for resource, key in (("CPU", "cpus"), ("GPU", "gpus")):
        of = attrgetter(key)
        needed = sum(bundle.get(resource, 0) for bundle in bundles)
        if needed > total.get(resource, 0) + 1e-6:
            raise StartError(
                f"no room for the actors: they need {needed:g} {resource}s (router.count {config.router.count} * "
                f"router.{key} {of(config.router):g} + shards.count {config.shards.count} * shards.{key} "
                f"{of(config.shards):g}), the Ray cluster has {total.get(resource, 0):g}; lower them, or add nodes"
            )
    # What stands in for each other is to be on different nodes; all else had better be close together.
    strategy = "SPREAD" if config.placement.replicas > 1 or config.router.count > 1 else "PACK"
    group = placement_group(bundles, strategy=strategy, name=app_name(config.ray.namespace), lifetime="detached")
    if not group.wait(ROOM_TIMEOUT_S):
        raise StartError(
            f"no room for the actors: bundles {bundles} did not fit within {ROOM_TIMEOUT_S:g} s; free now are "
            f"{ {k: v for k, v in ray.available_resources().items() if k in ('CPU', 'GPU')} }"
        )
    return group


def _create_controller(
    config: DeploymentConfig, checkpoint: Checkpoint, group: Any, blueprints: tuple[Blueprint, ...]
) -> None:
    shard_nodes = nodes_of_bundles(group)[config.router.count :]
    held = placement(config, checkpoint, shard_nodes)
    admin = AdminSettings(config.admin.host, config.admin.port, config.admin.token_file)
    spec = ControllerSpec(
        config.ray.namespace,
        blueprints,
        held,
        slots(config, held),
        expert_bytes(checkpoint),
        config.placement.replicas,
        config.frontend.replicas,
        config.frontend.grace_s,
        admin,
        scaling(config, checkpoint, held),
    )
    options = {"name": CONTROLLER, "namespace": config.ray.namespace, "lifetime": "detached", "max_restarts": -1}
    options |= {"runtime_env": {"env_vars": failpoints.environment()}}
    ray.remote(RemoteController).options(**options, num_cpus=0, max_concurrency=8).remote(spec)


def _wait_for_weights(actors: dict[str, Any], progress: Progress, deadline: float) -> None:
    loading = dict(actors)
    for name in loading:
        progress.loading(name, None)
    summaries: dict[str, str] = {}
    while loading:
        for name, actor in list(loading.items()):
            try:
                state: ActorState = ray.get(actor.state.remote(), timeout=max(deadline - time.monotonic(), 0))
            except ray.exceptions.GetTimeoutError:
                what = f"is {summaries[name]}" if name in summaries else "did not start"
                raise StartError(f"not all was loaded in time (start_timeout_s): {name} {what}") from None
            except ray.exceptions.RayActorError as error:
                # Ray would restart it for ever: what kills an actor while it loads, mostly memory,
                # does so each time.
                raise StartError(f"{name} died while starting: {_first_line(error)}") from None
            progress.loading(name, state)
            summaries[name] = state.summary
            if state.phase is Phase.FAILED:
                raise StartError(f"{name} failed to start: {state.error}")
            if state.phase is Phase.READY:
                del loading[name]
        if loading:
            time.sleep(POLL_S)
        if loading and time.monotonic() > deadline:
            late = "; ".join(f"{name} is {summaries[name]}" for name in loading)
            raise StartError(f"not all was loaded in time (start_timeout_s): {late}")


def _wait_until(missing: Callable[[], str], deadline: float, what: str) -> None:
    """Poll until `missing` returns an empty string.

    Raises StartError with `what` and its last answer.
    """
    while reason := missing():
        if time.monotonic() > deadline:
            raise StartError(f"{what} (start_timeout_s): {reason}")
        time.sleep(POLL_S)


def _unready_reason(router: Any) -> str:
    try:
        readiness = ray.get(router.readiness.remote(), timeout=10.0)
    except ray.exceptions.RayError as error:
        return _first_line(error)
    return "" if readiness.ready else readiness.detail or "not ready"


def _start_frontend(config: DeploymentConfig, checkpoint: Checkpoint) -> None:
    """Open the gRPC and HTTP ports.

    Until the router is ready, calls get UNAVAILABLE and health says NOT_SERVING.
    """
    frontend = config.frontend
    serve.start(
        http_options=HTTPOptions(host=frontend.host, port=frontend.http_port),
        grpc_options=gRPCOptions(port=frontend.grpc_port, grpc_servicer_functions=list(GRPC_SERVICER_FUNCTIONS)),
    )
    try:
        serve.run(
            build(frontend_spec(config, checkpoint), frontend.replicas),
            name=app_name(config.ray.namespace),
            route_prefix="/",
            external_scaler_enabled=True,  # so that the controller may change their number
        )
    except RuntimeError as error:
        raise StartError(f"the frontend failed to start: {_first_line(error)}") from None


def _not_serving(address: str) -> str:
    try:
        with Client(address) as client:
            status = client.health(timeout_s=HEALTH_TIMEOUT_S)
    except ClientError as error:
        return str(error)
    return "" if status == "SERVING" else status


def _first_line(error: BaseException) -> str:
    cause = getattr(error, "cause", None)
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(cause, BaseException):
        return f"{type(cause).__name__}: {_first_line(cause)}"  # what Ray puts before it are addresses and ids
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__

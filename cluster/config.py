"""What a deployment file may say: validated once, then frozen.

Only `checkpoint` is required. `deploy/local.yaml` shows every key with its default.
"""

from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from checkpoint.errors import DroverError, listed, quoted
from cluster.addresses import NAMESPACE, check_host, split_address
from cluster.autoscale_config import AutoscaleConfig
from cluster.config_section import Section
from cluster.policy.judgement import ScaleSettings
from router.kv_budget import KvBudget
from router.schedule.limits import DEFAULT_LIMITS

Port = Annotated[int, Field(ge=1, le=65535)]
Bytes = Annotated[int, Field(gt=0)]
Host = Annotated[str, AfterValidator(check_host)]


class ConfigError(DroverError):
    """A deployment file has a wrong key or value.

    The message names the key, the value and the valid values.
    """


class RayConfig(Section):
    """Which Ray to run on.

    address: "local" starts a Ray that belongs to the serving process. "auto" joins the cluster
    that runs on this machine, host:port joins the cluster there.
    num_cpus, num_gpus: resources of a local Ray. Default: those of the machine.
    """

    address: str = "local"
    namespace: Annotated[str, Field(pattern=f"^{NAMESPACE}$")] = "drover"
    num_cpus: Annotated[int, Field(ge=1)] | None = None
    num_gpus: Annotated[int, Field(ge=0)] | None = None

    @field_validator("address")
    @classmethod
    def _address_is_known(cls, address: str) -> str:
        if address not in ("local", "auto"):
            try:
                split_address(address)
            except ValueError as error:
                raise ValueError(f"{error}; or 'local' or 'auto'") from None
        return address


class PartConfig(Section):
    """Resources of one actor: the router, or one shard.

    cpus, gpus: reserved in Ray; fractions are allowed.
    threads: compute threads. Default: all cores of its machine for the router; an equal share of
    them for each shard there. Router and shards do not compete for cores, because they take turns.
    The exception is the shared expert, which the router computes while it waits for the shards.
    device: where it computes.
    """

    cpus: Annotated[float, Field(ge=0)] = 1.0
    gpus: Annotated[float, Field(ge=0)] = 0.0
    threads: Annotated[int, Field(ge=1)] | None = None
    device: Literal["cpu", "cuda"] = "cpu"

    @model_validator(mode="after")
    def _cuda_needs_a_gpu(self) -> "PartConfig":
        if self.device == "cuda" and self.gpus == 0:
            raise ValueError("device is 'cuda' but gpus is 0; set gpus to the share of a GPU that each actor gets")
        return self


class RouterConfig(PartConfig):
    """The routers.

    count: number of routers. Each has the whole model but its routed experts, and a link to every
    shard.
    """

    count: Annotated[int, Field(ge=1)] = 1


class ShardsConfig(PartConfig):
    """The expert shards.

    count: number of shards. Each layer's experts are spread evenly over them. 0 for a dense model.
    slots: experts of each MoE layer that a shard has room for. One slot is kept free for moving
    experts. Default: what the first placement needs, and that one.
    """

    cpus: Annotated[float, Field(ge=0)] = 0.5
    count: Annotated[int, Field(ge=0)] = 2
    slots: Annotated[int, Field(ge=2)] | None = None


class PlacementConfig(Section):
    """Which shards hold which experts.

    replicas: how many shards hold each expert, on different nodes where there are several.
    load_mbps: megabytes per second that each shard reads at most while it serves, when experts move.
    """

    replicas: Annotated[int, Field(ge=1)] = 1
    load_mbps: Annotated[float, Field(gt=0)] = 200.0


class LinksConfig(Section):
    """The links between routers and shards, and how frontends judge routers.

    backend: "tcp" sends rows through host memory, "nccl" between GPUs.
    heartbeat_ms: time between heartbeats, which also flow while a shard computes.
    dead_after_ms: a shard or router that is silent for this long counts as dead.
    stuck_after_ms: a shard that hangs in one message for longer ends itself, and is started again. So does a router
    that computes a layer for longer.
    """

    backend: Literal["tcp", "nccl"] = "tcp"
    heartbeat_ms: Annotated[float, Field(ge=1)] = 100.0
    dead_after_ms: Annotated[float, Field(gt=0)] = 500.0
    stuck_after_ms: Annotated[float, Field(gt=0)] = 10_000.0

    @model_validator(mode="after")
    def _silence_is_longer_than_a_heartbeat(self) -> "LinksConfig":
        if self.dead_after_ms < 3 * self.heartbeat_ms:
            raise ValueError(
                f"dead_after_ms is {self.dead_after_ms:g}; it must be at least 3 * heartbeat_ms ({self.heartbeat_ms:g})"
            )
        return self


class EngineConfig(Section):
    """Limits of the router's engine.

    max_running: requests computed at once.
    max_waiting: requests in the queue. Further requests are refused with a retry hint.
    max_step_tokens: tokens in one step, prompts and decoding together. At least max_running.
    kv_bytes: KV cache of all running requests together. Default: 1 GiB.
    kv_share: the same, as a share of the memory that is free on the router's device after loading.
    Set one of the two.
    prefix_cache: keep the KV cache of ended requests for requests with the same prefix.
    prefill_slowdown: how many times as long a decoding step may take because of long prompts.
    null: no limit.
    max_context_tokens: prompt and completion together. Default: all positions of the model.
    """

    max_running: Annotated[int, Field(ge=1)] = DEFAULT_LIMITS.max_running
    max_waiting: Annotated[int, Field(ge=1)] = DEFAULT_LIMITS.max_waiting
    max_step_tokens: Annotated[int, Field(ge=1, le=65536)] = DEFAULT_LIMITS.max_step_tokens
    kv_bytes: Bytes | None = None
    kv_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    prefix_cache: bool = DEFAULT_LIMITS.prefix_cache
    prefill_slowdown: Annotated[float, Field(gt=1)] | None = DEFAULT_LIMITS.prefill_slowdown
    max_context_tokens: Annotated[int, Field(ge=2)] | None = None

    @property
    def kv_budget(self) -> KvBudget:
        return KvBudget(self.kv_bytes, self.kv_share)

    @model_validator(mode="after")
    def _one_budget(self) -> "EngineConfig":
        if self.kv_bytes is not None and self.kv_share is not None:
            raise ValueError("kv_bytes and kv_share are both set; they say the same thing in two ways, set one")
        return self

    @model_validator(mode="after")
    def _every_running_request_gets_a_token(self) -> "EngineConfig":
        if self.max_step_tokens < self.max_running:
            raise ValueError(
                f"max_step_tokens is {self.max_step_tokens}; it must be at least max_running ({self.max_running}), "
                "so that every running request gets a token in each step"
            )
        return self


class FrontendConfig(Section):
    """The frontend: the Serve application that clients connect to.

    host: address on which gRPC and HTTP listen. The default is reachable from this machine only.
    http_port: port of GET /metrics, for Prometheus.
    replicas: frontend processes.
    grace_s: a frontend that is silent for this long counts as gone. The router then cancels its
    requests. When `drover serve` is told to stop, running requests may take as long to finish.
    """

    host: Host = "127.0.0.1"
    grpc_port: Port = 9000
    http_port: Port = 8000
    replicas: Annotated[int, Field(ge=1)] = 1
    grace_s: Annotated[float, Field(ge=2)] = 30.0

    @model_validator(mode="after")
    def _ports_differ(self) -> "FrontendConfig":
        if self.grpc_port == self.http_port:
            raise ValueError(f"grpc_port and http_port are both {self.grpc_port}; they must differ")
        return self


class AdminConfig(Section):
    """The Admin service, which operates the deployment (protos/drover/v1/admin.proto).

    host: address on which it listens, on the controller's node. The default is reachable from that
    machine only. Calls are not encrypted.
    port: 0 takes any free one; `drover status --json` tells which.
    token_file: holds the token that every call needs; made if it is missing, readable by this user
    alone. Default: a file in this user's drover folder, which `drover status --json` tells.
    """

    host: Host = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 9001
    token_file: Annotated[Path, Field(strict=False)] | None = None

    @field_validator("token_file")
    @classmethod
    def _token_file_is_absolute(cls, path: Path | None) -> Path | None:
        if path is not None and not path.is_absolute():
            raise ValueError("it must be absolute: the controller may run anywhere")
        return path


class DeploymentConfig(Section):
    """Everything that `drover serve` needs.

    checkpoint: a Hugging Face Llama 4 directory.
    model_name: name in the API. Default: the directory's name.
    dtype: type of weights and arithmetic. "auto" takes the checkpoint's.
    start_timeout_s: a start that takes longer fails.
    heal_s: requests wait so long for a router or shard that died to be replaced; then they fail.
    """

    checkpoint: Annotated[Path, Field(strict=False)]
    model_name: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    start_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    heal_s: Annotated[float, Field(ge=0)] = 60.0
    ray: RayConfig = RayConfig()
    router: RouterConfig = RouterConfig()
    shards: ShardsConfig = ShardsConfig()
    placement: PlacementConfig = PlacementConfig()
    links: LinksConfig = LinksConfig()
    engine: EngineConfig = EngineConfig()
    frontend: FrontendConfig = FrontendConfig()
    admin: AdminConfig = AdminConfig()
    autoscale: AutoscaleConfig = AutoscaleConfig()

    @property
    def name(self) -> str:
        return self.model_name or self.checkpoint.resolve().name

    @property
    def scale_settings(self) -> ScaleSettings:
        return self.autoscale.settings(self.shards.count, self.router.count, self.frontend.replicas)

    @model_validator(mode="after")
    def _scaling_keeps_replicas_apart(self) -> "DeploymentConfig":
        limits, replicas = self.autoscale.shards, self.placement.replicas
        if limits is not None and limits.min < replicas:
            raise ValueError(
                f"autoscale.shards.min is {limits.min}, and placement.replicas is {replicas}; each replica needs a "
                f"shard of its own, so min must be at least {replicas}"
            )
        return self

    @model_validator(mode="after")
    def _replicas_have_shards(self) -> "DeploymentConfig":
        replicas, count = self.placement.replicas, self.shards.count
        if count and replicas > count:
            raise ValueError(
                f"placement.replicas is {replicas}, and shards.count is {count}; each replica needs a shard of its own"
            )
        return self

    @model_validator(mode="after")
    def _admin_has_a_port_of_its_own(self) -> "DeploymentConfig":
        if self.admin.port in (self.frontend.grpc_port, self.frontend.http_port):
            raise ValueError(f"admin.port is {self.admin.port}, which is a port of the frontend; choose another")
        return self

    @model_validator(mode="after")
    def _nccl_needs_gpus(self) -> "DeploymentConfig":
        if self.links.backend == "nccl" and "cpu" in (self.router.device, self.shards.device):
            raise ValueError("links.backend is 'nccl'; router.device and shards.device must both be 'cuda'")
        return self


SECTIONS = ("ray", "router", "shards", "placement", "links", "engine", "frontend", "admin", "autoscale")


def parse_deployment(raw: dict[str, Any], source: str = "config") -> DeploymentConfig:
    """Validate a deployment given as plain data. Raises ConfigError, which names every wrong key."""
    if raw.get("checkpoint") in ("", None):
        raw = {key: value for key, value in raw.items() if key != "checkpoint"}
    # YAML reads a section without keys as null. It keeps its defaults.
    raw = {key: {} if value is None and key in SECTIONS else value for key, value in raw.items()}
    try:
        return DeploymentConfig.model_validate(raw)
    except ValidationError as error:
        problems = [problem_of(details, DeploymentConfig) for details in error.errors()]
        raise ConfigError(f"{source} is not a valid deployment:{listed(problems)}") from None


def problem_of(details: ErrorDetails, root: type[BaseModel]) -> str:
    """One line about a wrong key or value of a file whose keys are those of `root`."""
    key, given = ".".join(str(part) for part in details["loc"])[:100], quoted(details["input"])
    match details["type"]:
        case "missing":
            return f"{key} is missing" + ("; it must name a Llama 4 directory" if key == "checkpoint" else "")
        case "extra_forbidden":
            section: Any = root
            for part in details["loc"][:-1]:
                # A number is the index of an entry in a tuple of sections.
                section = section.model_fields[part].annotation if isinstance(part, str) else get_args(section)[0]
                if isinstance(section, UnionType):  # a section or None
                    section = get_args(section)[0]
            return f"{key} is unknown; valid keys here are {', '.join(section.model_fields)}"
        case "value_error":
            message = details["msg"].removeprefix("Value error, ")
            if isinstance(details["input"], str):
                return f"{key} is {given}: {message}"
            return f"{key}: {message}" if key else message
    return f"{key} is {given}: {details['msg'][0].lower()}{details['msg'][1:]}"

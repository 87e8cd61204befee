"""A deployment, described by one YAML file: read once, validated once, frozen.

Every key has a default but `checkpoint`. `deploy/local.yaml` shows them all.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from checkpoint.errors import DroverError
from router.kv_budget import KvBudget
from router.schedule.limits import DEFAULT_LIMITS

Port = Annotated[int, Field(ge=1, le=65535)]
Bytes = Annotated[int, Field(gt=0)]


class ConfigError(DroverError):
    """A deployment file has a wrong key or value. The message names the key, the value and what is valid."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RayConfig(_Section):
    """address: "local" starts Ray in the serving process; "auto" or host:port joins a running cluster.

    num_cpus, num_gpus: of a local Ray; none means as many as the machine has.
    """

    address: Annotated[str, Field(min_length=1)] = "local"
    namespace: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = "drover"
    num_cpus: Annotated[int, Field(ge=1)] | None = None
    num_gpus: Annotated[int, Field(ge=0)] | None = None


class PartConfig(_Section):
    """What one actor gets. cpus, gpus: reserved in Ray. threads: to compute with; none means the machine's cores, of
    which the router uses all, and shards on one machine, which compute at the same time, an equal part each: but for
    the shared expert, which the router computes beside them, router and shards take turns."""

    cpus: Annotated[float, Field(ge=0)] = 1.0
    gpus: Annotated[float, Field(ge=0)] = 0.0
    threads: Annotated[int, Field(ge=1)] | None = None
    device: Literal["cpu", "cuda"] = "cpu"

    @model_validator(mode="after")
    def _cuda_needs_a_gpu(self) -> "PartConfig":
        if self.device == "cuda" and self.gpus == 0:
            raise ValueError("device is 'cuda' but gpus is 0; set gpus to the share of a GPU that each actor gets")
        return self


class ShardsConfig(PartConfig):
    """The expert shards. count: how many; the experts of every layer are spread evenly over them."""

    cpus: Annotated[float, Field(ge=0)] = 0.5
    count: Annotated[int, Field(ge=1)] = 2


class LinksConfig(_Section):
    """Between routers and shards.

    backend: "gloo" carries rows through host memory, "nccl" between GPUs. heartbeat_ms, dead_after_ms: a shard not
    heard of for so long is dead. reply_deadline_ms: a shard that is alive may take so long over one layer.
    """

    backend: Literal["gloo", "nccl"] = "gloo"
    heartbeat_ms: Annotated[float, Field(ge=1)] = 100.0
    dead_after_ms: Annotated[float, Field(gt=0)] = 500.0
    reply_deadline_ms: Annotated[float, Field(gt=0)] = 10_000.0

    @model_validator(mode="after")
    def _silence_is_longer_than_a_heartbeat(self) -> "LinksConfig":
        if self.dead_after_ms < 3 * self.heartbeat_ms:
            raise ValueError(
                f"dead_after_ms is {self.dead_after_ms:g}; it must be at least 3 * heartbeat_ms ({self.heartbeat_ms:g})"
            )
        return self


class EngineConfig(_Section):
    """max_running: requests computed at once. max_waiting: requests in the queue; one more is refused.
    max_step_tokens: tokens in one step. kv_bytes: KV cache of all running requests together; kv_share: the same as a
    share of what is free on the router's device once router and shards are loaded. Without either, 1 GiB.
    prefix_cache: keep the KV cache of ended requests for others that begin the same. prefill_slowdown: a step of
    running streams may take so many times as long because of prompts computed beside them; none sets no limit.
    max_context_tokens: prompt and completion together; none means what the model allows."""

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


class FrontendConfig(_Section):
    """host: where gRPC listens; the default is reachable from this machine alone. http_port: of
    GET /metrics, for Prometheus. grace_s: a frontend not heard of for so long is forgotten, its requests cancelled."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    grpc_port: Port = 9000
    http_port: Port = 8000
    replicas: Annotated[int, Field(ge=1)] = 1
    grace_s: Annotated[float, Field(ge=2)] = 30.0

    @model_validator(mode="after")
    def _ports_differ(self) -> "FrontendConfig":
        if self.grpc_port == self.http_port:
            raise ValueError(f"grpc_port and http_port are both {self.grpc_port}; they must differ")
        return self


class DeploymentConfig(_Section):
    """checkpoint: a Hugging Face Llama 4 directory. model_name: none means the directory's name.
    dtype: of weights and arithmetic; "auto" is the checkpoint's. start_timeout_s: until the model must answer."""

    checkpoint: Annotated[Path, Field(strict=False)]
    model_name: Annotated[str, Field(min_length=1)] | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    start_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    ray: RayConfig = RayConfig()
    router: PartConfig = PartConfig()
    shards: ShardsConfig = ShardsConfig()
    links: LinksConfig = LinksConfig()
    engine: EngineConfig = EngineConfig()
    frontend: FrontendConfig = FrontendConfig()

    @property
    def name(self) -> str:
        return self.model_name or self.checkpoint.resolve().name

    @model_validator(mode="after")
    def _nccl_needs_gpus(self) -> "DeploymentConfig":
        if self.links.backend == "nccl" and "cpu" in (self.router.device, self.shards.device):
            raise ValueError("links.backend is 'nccl'; router.device and shards.device must both be 'cuda'")
        return self


SECTIONS = ("ray", "router", "shards", "links", "engine", "frontend")


def load_deployment(path: Path, overrides: Sequence[str] = ()) -> DeploymentConfig:
    """Read and validate the file; a relative `checkpoint` in it is relative to the file. Raises ConfigError.

    overrides: "section.key=value" each, value in YAML; they replace what the file says.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; deploy/local.yaml is an example of a deployment file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}; a mapping of keys to values is expected")
    _resolve_checkpoint(raw, path.parent)
    for override in overrides:
        _override(raw, override)
    _resolve_checkpoint(raw, Path.cwd())
    return parse_deployment(raw, str(path))


def parse_deployment(raw: dict[str, Any], source: str = "config") -> DeploymentConfig:
    """Validate a deployment given as plain data. Raises ConfigError naming every wrong key."""
    if raw.get("checkpoint") in ("", None):
        raw = {key: value for key, value in raw.items() if key != "checkpoint"}
    # A section with nothing below its name is one that keeps its defaults.
    raw = {key: {} if value is None and key in SECTIONS else value for key, value in raw.items()}
    try:
        return DeploymentConfig.model_validate(raw)
    except ValidationError as error:
        problems = "\n  ".join(_problem(details) for details in error.errors())
        raise ConfigError(f"{source} is not a valid deployment:\n  {problems}") from None


def _resolve_checkpoint(raw: dict[str, Any], folder: Path) -> None:
    if isinstance(raw.get("checkpoint"), str) and raw["checkpoint"]:
        raw["checkpoint"] = str((folder / Path(raw["checkpoint"]).expanduser()).resolve())


def _override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"{override!r} is no override; write section.key=value, such as shards.count=3")
    *sections, last = key.split(".")
    for name in sections:
        raw = raw.setdefault(name, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"{override!r} cannot be set: {name} is not a section")
    try:
        raw[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r} has a value that is not valid YAML: {error}") from None


def _problem(details: ErrorDetails) -> str:
    key = ".".join(str(part) for part in details["loc"])
    match details["type"]:
        case "missing":
            return f"{key} is missing" + ("; it must name a Llama 4 directory" if key == "checkpoint" else "")
        case "extra_forbidden":
            section: Any = DeploymentConfig
            for part in details["loc"][:-1]:
                section = section.model_fields[str(part)].annotation
            return f"{key} is unknown; valid keys here are {', '.join(section.model_fields)}"
        case "value_error":
            message = details["msg"].removeprefix("Value error, ")
            return f"{key}: {message}" if key else message
    return f"{key} is {details['input']!r}: {details['msg'][0].lower()}{details['msg'][1:]}"

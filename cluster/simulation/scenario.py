"""What a scenario file may say: validated once, then frozen.

Every key has a default. `deploy/simulation.yaml` shows them all. Times that a machine takes are in
microseconds, times of the scenario in seconds.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from checkpoint.errors import listed
from cluster.autoscale_config import AutoscaleConfig
from cluster.config import ConfigError, problem_of
from cluster.config_section import Section
from cluster.policy.judgement import ScaleSettings

DEMO_TRACE = Path(__file__).parents[2] / "demo" / "routing_trace.npz"

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0)]
Micros = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class ModelSection(Section):
    """The model; the defaults are the embedded one's.

    moe_layers: layers with routed experts; 0 for a dense model. expert_bytes: weights of one expert
    of one layer. row_bytes: one row on a link, each way.
    """

    moe_layers: Annotated[int, Field(ge=0, le=256)] = 4
    experts: Annotated[int, Field(ge=1, le=1024)] = 128
    experts_per_token: Annotated[int, Field(ge=1, le=64)] = 1
    expert_bytes: Count = 36_864
    row_bytes: Count = 256

    @model_validator(mode="after")
    def _a_token_has_different_experts(self) -> "ModelSection":
        if self.experts_per_token > self.experts:
            raise ValueError(f"experts_per_token is {self.experts_per_token}, and there are {self.experts} experts")
        return self


class RouterCosts(Section):
    """What a router takes: per step, per token, per MoE layer, and so on.

    The dense layers between two MoE layers count as part of the MoE layer.
    message_us: for each shard that a layer asks. context_us: per layer, for each token of context
    that the step's tokens attend to.
    """

    step_us: Micros = 1000.0
    token_us: Micros = 20.0
    layer_us: Micros = 300.0
    layer_token_us: Micros = 5.0
    context_us: Micros = 0.0
    message_us: Micros = 50.0


class ShardCosts(Section):
    """What a shard takes for a message: message_us + bytes of active experts / read_gb_s + rows * row_us.

    start_s: from the wish for a new shard to its process. restart_s: the same for one that died.
    load_slowdown: how many times as long computing takes while experts are loaded.
    """

    message_us: Micros = 100.0
    read_gb_s: Positive = 5.0
    row_us: Micros = 5.0
    load_mb_s: Positive = 100.0
    load_slowdown: Annotated[float, Field(ge=1)] = 1.1
    start_s: Seconds = 5.0
    restart_s: Seconds = 3.0


class LinkCosts(Section):
    """What a link takes. latency_us: there and back. lost_ms: until a router knows that a shard is gone."""

    latency_us: Micros = 100.0
    gb_s: Positive = 1.0
    lost_ms: Annotated[float, Field(ge=0)] = 20.0


class CostsSection(Section):
    """The machine. The defaults are round numbers of the embedded model on a core of an x86-64 server.

    `python -m bench.live_and_simulated` measures those of a machine; `drover simulate --costs` takes them.
    jitter: standard deviation of the logarithm of a step's time. 0: every step takes what the
    formulas say.
    """

    router: RouterCosts = RouterCosts()
    shard: ShardCosts = ShardCosts()
    link: LinkCosts = LinkCosts()
    jitter: Annotated[float, Field(ge=0, le=2)] = 0.05


class ShardsSection(Section):
    """The expert shards at the start.

    slots: per MoE layer and shard. Default: what the first placement needs, and one more.
    per_node: shards on one node; default: one. parallel: how many shards of a node compute at full
    speed at once; default: all.
    """

    count: Annotated[int, Field(ge=1, le=1024)] = 4
    slots: Count | None = None
    replicas: Count = 1
    per_node: Count = 1
    parallel: Positive | None = None


class EngineSection(Section):
    """The limits of each router's scheduler, as in a deployment file. kv_tokens: room in the KV cache."""

    max_running: Count = 64
    max_waiting: Count = 4096
    max_step_tokens: Count = 1024
    prefill_slowdown: Annotated[float, Field(gt=1)] | None = 1.6
    kv_tokens: Count = 1_048_576

    @model_validator(mode="after")
    def _every_running_request_gets_a_token(self) -> "EngineSection":
        if self.max_step_tokens < self.max_running:
            raise ValueError(
                f"max_step_tokens is {self.max_step_tokens}; it must be at least max_running ({self.max_running})"
            )
        return self


class TrafficSection(Section):
    """When requests come, and how long they are.

    shape: "poisson" has one rate. "bursts" multiplies it by factor for burst_s, every period_s.
    "diurnal" swings between the rate and factor times it, once per period_s. "step" multiplies it
    by factor from from_s to until_s. "closed" keeps `streams` requests under way instead.
    spread: lengths are uniform within this share of the mean. ends_s: no request comes later.
    """

    shape: Literal["poisson", "bursts", "diurnal", "step", "closed"] = "poisson"
    requests_per_s: Positive = 4.0
    streams: Count = 16
    factor: Annotated[float, Field(ge=0, le=1000)] = 3.0
    period_s: Positive = 60.0
    burst_s: Positive = 10.0
    from_s: Seconds = 30.0
    until_s: Seconds = 90.0
    prompt_tokens: Count = 64
    output_tokens: Count = 128
    spread: Annotated[float, Field(ge=0, lt=1)] = 0.5
    ends_s: Seconds | None = None


class HotSection(Section):
    """For some time a share of all rows goes to a few experts of every layer, evenly.

    They are neighbours, which one shard has at first.
    """

    experts: Count = 4
    share: Share = 0.5
    from_s: Seconds = 30.0
    until_s: Seconds = 90.0

    @model_validator(mode="after")
    def _it_begins_before_it_ends(self) -> "HotSection":
        if self.until_s <= self.from_s:
            raise ValueError(f"until_s is {self.until_s:g}; it must be above from_s ({self.from_s:g})")
        return self


class RoutingSection(Section):
    """Which experts tokens go to.

    source: "zipf" gives the expert of rank r the weight 1 / r ** exponent, with ranks of their own
    in every layer. "uniform" is zipf with 0. "trace" replays recorded tokens in their order; each
    request begins somewhere. trace: an .npz file as demo/trace.py writes. Default: the recorded
    one of the embedded model. kinds: of its text; default: all.
    drift_s: after so long every expert has the weight of the next one. hot: see HotSection.
    """

    source: Literal["zipf", "uniform", "trace"] = "zipf"
    exponent: Annotated[float, Field(ge=0, le=4)] = 0.6
    trace: Annotated[Path, Field(strict=False)] | None = None
    kinds: Annotated[tuple[str, ...], Field(strict=False)] = ()
    drift_s: Positive | None = None
    hot: Annotated[tuple[HotSection, ...], Field(strict=False)] = ()


class FaultSection(Section):
    """A shard dies; it is back, with all that it has to hold, after costs.shard.restart_s and loading."""

    shard: Annotated[int, Field(ge=0)]
    at_s: Seconds


class SimulatedAutoscale(AutoscaleConfig):
    """As in a deployment file, but what it decides is done unless told otherwise: nobody is hurt."""

    dry_run: bool = False


class Scenario(Section):
    """Everything that `drover simulate` needs.

    duration_s: of simulated time. sample_s: time between two rows of the result.
    """

    duration_s: Annotated[float, Field(gt=0, le=1e6)] = 120.0
    sample_s: Positive = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    routers: Annotated[int, Field(ge=1, le=256)] = 1
    model: ModelSection = ModelSection()
    shards: ShardsSection = ShardsSection()
    engine: EngineSection = EngineSection()
    traffic: TrafficSection = TrafficSection()
    routing: RoutingSection = RoutingSection()
    autoscale: SimulatedAutoscale = SimulatedAutoscale()
    costs: CostsSection = CostsSection()
    faults: Annotated[tuple[FaultSection, ...], Field(strict=False)] = ()

    @property
    def num_shards(self) -> int:
        """At the start; a dense model has none."""
        return self.shards.count if self.model.moe_layers else 0

    @property
    def most_shards(self) -> int:
        """That there may ever be."""
        limits = self.autoscale.shards
        return max(self.num_shards, limits.max) if limits is not None and self.num_shards else self.num_shards

    @property
    def scale_settings(self) -> ScaleSettings:
        return self.autoscale.settings(self.num_shards, self.routers, 1)

    @property
    def slots(self) -> int:
        """Of each shard, for each MoE layer."""
        return self.shards.slots or self._needed_slots

    @property
    def _needed_slots(self) -> int:
        """By the first placement, and one for moves."""
        return -(-self.model.experts * self.shards.replicas // self.shards.count) + 1

    @model_validator(mode="after")
    def _the_experts_fit(self) -> "Scenario":
        shards, experts = self.shards, self.model.experts
        if shards.count > experts:
            raise ValueError(f"shards.count is {shards.count}; with {experts} experts, at most {experts} have any")
        if shards.replicas > shards.count:
            raise ValueError(f"shards.replicas is {shards.replicas}, and shards.count is {shards.count}")
        needed = self._needed_slots
        if shards.slots is not None and shards.slots < needed:
            raise ValueError(
                f"shards.slots is {shards.slots}; {experts} experts with {shards.replicas} replicas on "
                f"{shards.count} shards need {needed - 1}, and one for moves: at least {needed}"
            )
        return self

    @model_validator(mode="after")
    def _fewer_shards_hold_all(self) -> "Scenario":
        limits, needed = self.autoscale.shards, self.model.experts * self.shards.replicas
        if limits is None or not self.model.moe_layers:
            return self
        if limits.max > self.model.experts:
            raise ValueError(f"autoscale.shards.max is {limits.max}; the model has {self.model.experts} experts")
        if limits.min * (self.slots - 1) < needed:
            raise ValueError(
                f"autoscale.shards.min is {limits.min}; so few hold {limits.min} * {self.slots - 1} experts of a "
                f"layer, and {needed} are needed: raise it, or shards.slots"
            )
        return self

    @model_validator(mode="after")
    def _a_request_fits(self) -> "Scenario":
        most = round((self.traffic.prompt_tokens + self.traffic.output_tokens) * (1 + self.traffic.spread)) + 64
        if most > self.engine.kv_tokens:
            raise ValueError(f"engine.kv_tokens is {self.engine.kv_tokens}; one request may need {most}")
        return self

    @model_validator(mode="after")
    def _faults_meet_shards(self) -> "Scenario":
        for fault in self.faults:
            if fault.shard >= self.shards.count:
                raise ValueError(f"faults: shard {fault.shard} is none of the {self.shards.count} shards, from 0")
        return self


def parse_scenario(raw: dict[str, Any], source: str = "scenario") -> Scenario:
    """Validate a scenario given as plain data. Raises ConfigError, which names every wrong key."""
    raw = {key: value for key, value in raw.items() if value is not None}  # YAML reads an empty section as null
    try:
        return Scenario.model_validate(raw)
    except ValidationError as error:
        problems = [problem_of(details, Scenario) for details in error.errors()]
        raise ConfigError(f"{source} is not a valid scenario:{listed(problems)}") from None

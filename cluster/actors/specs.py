"""From a deployment file and a checkpoint to what each actor is told. Starts nothing."""

from collections.abc import Sequence

import torch

from checkpoint.tensors import Checkpoint
from cluster.actors.autoscaler import ScalingSpec
from cluster.actors.link_keeper import LinkSettings
from cluster.actors.router import RouterSpec
from cluster.actors.shard import ShardSpec
from cluster.config import DeploymentConfig
from cluster.part_names import router_name, shard_name
from cluster.serve_app import FrontendSpec
from experts.endpoint import Liveness
from experts.placement import Placement, even_placement
from experts.wire import WireFormat
from router.schedule.limits import SchedulerLimits

# A shard is more patient than a router: a router that is merely stalled would otherwise lose all
# its links at once.
SHARD_PATIENCE = 10.0


def router_specs(
    config: DeploymentConfig, checkpoint: Checkpoint, shard_nodes: Sequence[str] | None = None
) -> list[RouterSpec]:
    """The routers, by number. shard_nodes: the node of each shard; None: all are on one."""
    return [_router_spec(name, config, checkpoint, shard_nodes) for name in router_names(config)]


def _router_spec(
    name: str, config: DeploymentConfig, checkpoint: Checkpoint, shard_nodes: Sequence[str] | None
) -> RouterSpec:
    engine, links = config.engine, config.links
    silence_s, heartbeat_s = links.dead_after_ms / 1e3, links.heartbeat_ms / 1e3
    dtype = _dtype(config, checkpoint)
    return RouterSpec(
        name=name,
        namespace=config.ray.namespace,
        checkpoint=config.checkpoint,
        placement=placement(config, checkpoint, shard_nodes),
        dtype=dtype,
        device=config.router.device,
        threads=config.router.threads,
        limits=SchedulerLimits(
            engine.max_running,
            engine.max_waiting,
            engine.max_step_tokens,
            kv_bytes=0,  # for the router to fill in from kv_budget
            prefix_cache=engine.prefix_cache,
            prefill_slowdown=engine.prefill_slowdown,
        ),
        kv_budget=engine.kv_budget,
        max_context_tokens=engine.max_context_tokens,
        frontend_grace_s=config.frontend.grace_s,
        heal_s=config.heal_s,
        stuck_after_s=config.links.stuck_after_ms / 1e3,
        links=LinkSettings(
            wire=WireFormat(
                max_groups=checkpoint.config.num_experts,
                max_rows=engine.max_step_tokens * checkpoint.config.experts_per_token,
                hidden_size=checkpoint.config.hidden_size,
                dtype=dtype,
                rows_inline=links.backend == "tcp",
            ),
            router_liveness=Liveness(heartbeat_s, silence_s),
            shard_liveness=Liveness(heartbeat_s, SHARD_PATIENCE * silence_s),
        ),
    )


def shard_specs(
    config: DeploymentConfig, checkpoint: Checkpoint, shard_nodes: Sequence[str] | None = None
) -> list[ShardSpec]:
    """The expert shards, by number: an even share of every MoE layer's experts each."""
    held = placement(config, checkpoint, shard_nodes)
    return [
        ShardSpec(
            name=name,
            namespace=config.ray.namespace,
            checkpoint=config.checkpoint,
            slots=held.slots_of(index),
            dtype=_dtype(config, checkpoint),
            device=config.shards.device,
            threads=config.shards.threads,
            stuck_after_s=config.links.stuck_after_ms / 1e3,
            load_bytes_per_s=config.placement.load_mbps * 1e6,
        )
        for index, name in enumerate(_shard_names(config))
    ]


def frontend_spec(config: DeploymentConfig, checkpoint: Checkpoint) -> FrontendSpec:
    """What every frontend replica serves."""
    return FrontendSpec(
        model_name=config.name,
        checkpoint=config.checkpoint,
        dtype=str(_dtype(config, checkpoint)).removeprefix("torch."),
        router_names=router_names(config),
        shard_names=_shard_names(config),
        namespace=config.ray.namespace,
        max_context_tokens=config.engine.max_context_tokens,
        silence_s=config.links.dead_after_ms / 1e3,
        heal_s=config.heal_s,
    )


def router_names(config: DeploymentConfig) -> tuple[str, ...]:
    """The names of the routers' actors, by number."""
    return tuple(router_name(index) for index in range(config.router.count))


def placement(config: DeploymentConfig, checkpoint: Checkpoint, shard_nodes: Sequence[str] | None) -> Placement:
    """Which shards hold which experts when the deployment starts. shard_nodes: the shards' nodes, by number."""
    model, replicas = checkpoint.config, config.placement.replicas
    return even_placement(
        model.moe_layers, model.num_experts, config.shards.count, replicas=replicas, nodes=shard_nodes
    )


def slots(config: DeploymentConfig, first: Placement) -> int:
    """How many experts of each MoE layer a shard has room for. first: what the deployment begins with."""
    return max(config.shards.slots or 0, first.most_per_layer + 1)


def expert_bytes(checkpoint: Checkpoint) -> dict[int, int]:
    """What a shard reads of one expert, by MoE layer."""
    return {layer: checkpoint.expert_bytes(layer) for layer in checkpoint.config.moe_layers}


def scaling(config: DeploymentConfig, checkpoint: Checkpoint, first: Placement) -> ScalingSpec:
    """What autoscaling goes by. first: what the deployment begins with."""
    largest = max(expert_bytes(checkpoint).values(), default=0)
    return ScalingSpec(config.scale_settings, config.placement.load_mbps * 1e6, largest, slots(config, first))


def _shard_names(config: DeploymentConfig) -> tuple[str, ...]:
    return tuple(shard_name(index) for index in range(config.shards.count))


def _dtype(config: DeploymentConfig, checkpoint: Checkpoint) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, checkpoint.config.dtype if config.dtype == "auto" else config.dtype)
    return dtype

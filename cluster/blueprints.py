"""From a deployment file and the nodes of its bundles to all that it takes to create each part. Starts nothing."""

import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import ray

from checkpoint.tensors import Checkpoint
from cluster.actors import failpoints
from cluster.actors.creation import Blueprint
from cluster.actors.router import RouterSpec
from cluster.actors.shard import ShardSpec
from cluster.actors.specs import router_specs, shard_specs
from cluster.config import DeploymentConfig, PartConfig
from experts.groups.nccl import NCCL_ENVIRONMENT
from kernels.openmp import WAITING_THREADS

Spec = TypeVar("Spec", RouterSpec, ShardSpec)


def nodes_of_bundles(group: Any) -> list[str]:
    """The nodes of the bundles: each router's, then each shard's."""
    nodes: dict[int, str] = ray.util.placement_group_table(group)["bundles_to_node_id"]
    return [nodes[bundle] for bundle in sorted(nodes)]


def blueprints_of(config: DeploymentConfig, checkpoint: Checkpoint, group: Any) -> tuple[Blueprint, ...]:
    """Routers first, in the order of their bundles."""
    nodes, count = nodes_of_bundles(group), config.router.count
    router_nodes, shard_nodes = nodes[:count], nodes[count:]
    routers = _with_neighbours(router_specs(config, checkpoint, shard_nodes), router_nodes)
    shards = _with_neighbours(shard_specs(config, checkpoint, shard_nodes), shard_nodes)
    return (
        *(_blueprint(router, config, config.router, index) for index, router in enumerate(routers)),
        *(_blueprint(shard, config, config.shards, count + index) for index, shard in enumerate(shards)),
    )


def _with_neighbours(specs: Sequence[Spec], nodes: Sequence[str]) -> list[Spec]:
    """The specs, told how many of them share each one's node. nodes: of each."""
    on_node = Counter(nodes)
    return [replace(spec, neighbours=on_node[node]) for spec, node in zip(specs, nodes, strict=True)]


def _blueprint(spec: RouterSpec | ShardSpec, config: DeploymentConfig, part: PartConfig, bundle: int) -> Blueprint:
    environment = WAITING_THREADS | NCCL_ENVIRONMENT | failpoints.environment()
    is_shard = isinstance(spec, ShardSpec)
    return Blueprint(
        spec.name, config.ray.namespace, is_shard, bundle, part.cpus, part.gpus, environment, pickle.dumps(spec)
    )

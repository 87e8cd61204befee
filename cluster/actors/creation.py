"""How routers and shards become Ray actors: by the launcher at first, by the controller when one is gone for good."""

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.actors.remote import RemoteRouter, RemoteShard

# Ray drops bundles without resources, which would shift the index of all later bundles.
MIN_CPUS = 0.001


@dataclass(frozen=True)
class Blueprint:
    """All that it takes to create one router or shard, as often as needed.

    bundle: its place in the deployment's placement group. spec: a RouterSpec or ShardSpec, pickled,
    so that whoever only passes it on needs no torch. environment: of its process.
    """

    name: str
    namespace: str
    is_shard: bool
    bundle: int
    cpus: float
    gpus: float
    environment: Mapping[str, str]
    spec: bytes

    @property
    def needs(self) -> dict[str, float]:
        """What it reserves in Ray."""
        return {"CPU": max(self.cpus, MIN_CPUS)} | ({"GPU": self.gpus} if self.gpus else {})

    def create(self, group: Any, node: str | None = None) -> Any:
        """Create the actor: in its bundle of the placement group, or on the node with this id.

        A node is only where it starts: should that node be lost, Ray starts it on any with room.
        Raises ValueError if an actor of that name exists.
        """
        where: Any = (
            PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=self.bundle)
            if node is None
            else NodeAffinitySchedulingStrategy(node, soft=True)
        )
        options = {
            "name": self.name,
            "namespace": self.namespace,
            "lifetime": "detached",
            "num_cpus": self.needs["CPU"],
            "num_gpus": self.gpus,
            "max_restarts": -1,
            # A shard's actor has threads. A router's has coroutines, and each frontend keeps one
            # pull waiting there.
            "max_concurrency": 8 if self.is_shard else 1000,
            "scheduling_strategy": where,
            "runtime_env": {"env_vars": dict(self.environment)},
        }
        cls = RemoteShard if self.is_shard else RemoteRouter
        return ray.remote(cls).options(**options).remote(_Sealed(self.spec))


class _Sealed:
    """Arrives as what was pickled, and is not opened before."""

    def __init__(self, pickled: bytes) -> None:
        self._pickled = pickled

    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        return pickle.loads, (self._pickled,)

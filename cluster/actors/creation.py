"""How routers and shards become Ray actors: by the launcher at first, by the controller when one is gone for good."""

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.actors.remote import RemoteRouter, RemoteShard

# Ray drops bundles without resources, which would shift the index of all later bundles.
MIN_CPUS = 0.001


@dataclass(frozen=True)
class Blueprint:
    """All that it takes to create one router or shard, as often as needed.

    bundle: its place in the deployment's placement group; None: Ray finds it a node. spec: a
    RouterSpec or ShardSpec, pickled, so that whoever only passes it on needs no torch.
    environment: of its process. changes: fields of the spec, pickled, that are other for this part.
    """

    name: str
    namespace: str
    is_shard: bool
    bundle: int | None
    cpus: float
    gpus: float
    environment: Mapping[str, str]
    spec: bytes
    changes: bytes | None = None

    @property
    def needs(self) -> dict[str, float]:
        """What it reserves in Ray."""
        return {"CPU": max(self.cpus, MIN_CPUS)} | ({"GPU": self.gpus} if self.gpus else {})

    def create(self, group: Any, node: str | None = None) -> Any:
        """Create the actor: on the node with this id, or else in its bundle, or else where Ray likes.

        A node is only where it starts: should that node be lost, Ray starts it on any with room.
        Raises ValueError if an actor of that name exists.
        """
        where: Any = "SPREAD"
        if node is not None:
            where = NodeAffinitySchedulingStrategy(node, soft=True)
        elif self.bundle is not None:
            where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=self.bundle)
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
        return ray.remote(cls).options(**options).remote(_Sealed(self.spec, self.changes))


class _Sealed:
    """Arrives as the spec that was pickled, with its changes, and is not opened before."""

    def __init__(self, spec: bytes, changes: bytes | None) -> None:
        self._spec, self._changes = spec, changes

    def __reduce__(self) -> tuple[Callable[[bytes, bytes | None], Any], tuple[bytes, bytes | None]]:
        return _opened, (self._spec, self._changes)


def _opened(spec: bytes, changes: bytes | None) -> Any:
    opened = pickle.loads(spec)
    return opened if changes is None else replace(opened, **pickle.loads(changes))

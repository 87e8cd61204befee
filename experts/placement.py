"""Which shards hold which experts, and at which version.

Pure data; a change is a new object with a higher epoch.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

INITIAL_VERSION = 1
"""Of the weights in the checkpoint that a deployment starts with."""

Slot = tuple[int, int]
"""(layer, expert): what one slot of a shard holds. Layers are 0-based indices in the model."""


@dataclass(frozen=True)
class Placement:
    """(layer, expert) -> shards, and the version of the weights that these must compute with.

    epoch: grows with every change; only a controller and its routers compare epochs, shards never
    see them.
    num_shards: shards are numbered below this; a number may have no shard.
    shards_of: for each MoE layer, for each expert, the shards that hold it.
    versions_of: for each MoE layer, for each expert, the version of its weights.
    """

    epoch: int
    num_shards: int
    shards_of: Mapping[int, tuple[tuple[int, ...], ...]]
    versions_of: Mapping[int, tuple[int, ...]]

    @cached_property
    def used_shards(self) -> frozenset[int]:
        """The shards that hold anything: one that is new, or about to leave, may hold nothing."""
        return frozenset(shard for by_expert in self.shards_of.values() for shards in by_expert for shard in shards)

    @property
    def most_per_layer(self) -> int:
        """The most experts of one layer that a shard holds."""
        held = [Counter(shard for shards in by_expert for shard in shards) for by_expert in self.shards_of.values()]
        return max((count for counts in held for count in counts.values()), default=0)

    def slots_of(self, shard: int) -> dict[Slot, int]:
        """What `shard` holds: the version of each slot's weights, layer by layer, experts in
        ascending order."""
        return {
            (layer, expert): self.versions_of[layer][expert]
            for layer, by_expert in self.shards_of.items()
            for expert, shards in enumerate(by_expert)
            if shard in shards
        }


def uniform_placement(
    num_shards: int,
    shards_of: Mapping[int, tuple[tuple[int, ...], ...]],
    *,
    epoch: int = 1,
    version: int = INITIAL_VERSION,
) -> Placement:
    """A placement in which the weights of every expert have the same version."""
    versions_of = {layer: (version,) * len(by_expert) for layer, by_expert in shards_of.items()}
    return Placement(epoch, num_shards, shards_of, versions_of)


def even_placement(
    moe_layers: Sequence[int],
    num_experts: int,
    num_shards: int,
    *,
    replicas: int = 1,
    nodes: Sequence[str] | None = None,
    epoch: int = 1,
    version: int = INITIAL_VERSION,
) -> Placement:
    """Each expert on `replicas` shards, so that all hold about as many.

    Of each expert's shards the first is given in contiguous blocks that differ by at most one
    expert: a shard then reads one range of each fused tensor. 5 experts on 2 shards are 0 0 0 1 1.
    The others are spread over all shards, and over other nodes first: when a shard dies, its rows
    go to many. nodes: where each shard runs; None: all on one. A model without MoE layers has no
    shards.

    Example: 4 experts on 2 shards with 2 replicas are (0, 1) (0, 1) (1, 0) (1, 0).
    """
    if not moe_layers:
        assert num_shards == 0
        return uniform_placement(0, {}, epoch=epoch, version=version)
    assert 1 <= num_shards <= num_experts, f"{num_shards} shards for {num_experts} experts"
    assert 1 <= replicas <= num_shards, f"{replicas} replicas on {num_shards} shards"
    nodes = nodes or [""] * num_shards
    shards_of = [[expert * num_shards // num_experts] for expert in range(num_experts)]
    held = Counter(shard for [shard] in shards_of)
    shared: Counter[tuple[int, int]] = Counter()  # (shard, other) -> experts of the first that the other has, too
    first_expert = [-(-shard * num_experts // num_shards) for shard in range(num_shards)]
    # One expert of each shard in turn: what is given last could only go to few.
    dealt = sorted(range(num_experts), key=lambda expert: (expert - first_expert[shards_of[expert][0]], expert))
    for _ in range(replicas - 1):
        for shards in (shards_of[expert] for expert in dealt):
            used = Counter(nodes[shard] for shard in shards)
            others = [shard for shard in range(num_shards) if shard not in shards]
            first = shards[0]
            best = min(others, key=lambda s: (used[nodes[s]], held[s], shared[first, s], (s - first) % num_shards))
            shards.append(best)
            held[best] += 1
            shared[first, best] += 1
    by_expert = tuple(tuple(shards) for shards in shards_of)
    return uniform_placement(num_shards, dict.fromkeys(moe_layers, by_expert), epoch=epoch, version=version)

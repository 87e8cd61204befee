"""Which shards hold which experts. Pure data; a new placement is a new object with a higher version."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """(layer, expert) -> shards.

    version: grows with every change; messages carry it, and a shard refuses one that it does not serve.
    num_shards: shards are numbered from 0.
    shards_of: for each MoE layer (its 0-based index in the model), for each expert, the shards that hold it.
    """

    version: int
    num_shards: int
    shards_of: dict[int, tuple[tuple[int, ...], ...]]

    def experts_of(self, shard: int) -> dict[int, tuple[int, ...]]:
        """For each MoE layer the experts that `shard` holds, in ascending order."""
        return {
            layer: tuple(expert for expert, shards in enumerate(by_expert) if shard in shards)
            for layer, by_expert in self.shards_of.items()
        }


def even_placement(moe_layers: Sequence[int], num_experts: int, num_shards: int, version: int = 1) -> Placement:
    """Each expert once, in contiguous blocks that differ by at most one expert.

    Contiguous, so that a shard reads one range of each fused tensor: 5 experts on 2 shards are 0 0 0 1 1.
    """
    assert 1 <= num_shards <= num_experts, f"{num_shards} shards for {num_experts} experts"
    by_expert = tuple((expert * num_shards // num_experts,) for expert in range(num_experts))
    return Placement(version, num_shards, dict.fromkeys(moe_layers, by_expert))

"""Loads and rooms for tests of the balance policy."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cluster.policy.balance import ShardRoom
from cluster.policy.load import Loads
from experts.placement import Placement

FLASHLB = (600.0, 560.0, 120.0, 120.0, 20.0, 10.0, 10.0, 10.0)
"""The example that FlashLB's authors publish, for 8 shards with 2 slots; EPLB's largest load is 232, theirs 205."""


def loads_of(*layers: Sequence[float]) -> Loads:
    """One window: the load of each layer's experts."""
    return Loads(tuple(range(len(layers))), np.array([layers], dtype=np.float64))


def zipf(num_layers: int, num_experts: int, exponent: float, seed: int = 0) -> npt.NDArray[np.float64]:
    """load_LE: 1000 / rank**exponent, each layer in an order of its own."""
    rng = np.random.default_rng(seed)
    ranked = 1000.0 / np.arange(1, num_experts + 1) ** exponent
    return rng.permuted(np.tile(ranked, (num_layers, 1)), axis=1)


def rooms(num_shards: int, slots: int, nodes: int = 1) -> list[ShardRoom]:
    """Shards with as many slots each, dealt to nodes in turn."""
    return [ShardRoom(number, f"node-{number % nodes}", slots) for number in range(num_shards)]


def copies_of(placement: Placement) -> list[int]:
    """Over all layers and experts."""
    return [len(shards) for by_expert in placement.shards_of.values() for shards in by_expert]

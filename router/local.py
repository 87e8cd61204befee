"""The whole model in one process: router and expert shards over LocalLinks."""

from collections.abc import Callable

import torch

from checkpoint.config import ModelConfig
from checkpoint.tensors import Checkpoint
from checkpoint.weights import WeightReader
from experts.link import LocalLink
from experts.link_table import LinkTable
from experts.placement import even_placement
from experts.shard import load_shard
from kernels.choose import choose_kernels
from kernels.kernels import Kernels
from router.model.dispatch import Dispatcher
from router.model.llama4 import Model

CPU = torch.device("cpu")


def load_model(
    checkpoint: Checkpoint,
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    num_shards: int = 1,
    on_bytes: Callable[[int], None] | None = None,
    kernels: Kernels | None = None,
) -> Model:
    """The model over LocalLinks on the kernels' device, its experts spread evenly over `num_shards` shards.

    config: the checkpoint's, unless a test falsifies it. on_bytes: called with the size of each
    piece read.
    kernels: shared by the router and the shards, which compute in turn. By default the fastest on
    the CPU for this thread's torch thread count.
    """
    num_shards = num_shards if config.moe_layers else 0
    placement = even_placement(config.moe_layers, config.num_experts, num_shards)
    kernels = kernels or choose_kernels(CPU, dtype, torch.get_num_threads())
    links = {
        shard: LocalLink(load_shard(checkpoint, placement.slots_of(shard), kernels, on_bytes))
        for shard in range(num_shards)
    }
    weights = WeightReader(checkpoint, dtype, kernels.device, on_bytes)
    return Model(config, weights, Dispatcher(placement, LinkTable(links), kernels.device), kernels)

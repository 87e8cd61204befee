"""An expert shard: the weights of some experts of every MoE layer, and what they compute.

Knows no transport.

Legend: N rows, D model width, F expert width.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from checkpoint.tensors import Checkpoint
from experts.placement import Slot
from experts.slots import HeldExpert, Slots
from kernels.kernels import Kernels


class ExpertShard:
    """Slots, and computing with them.

    That is a pure function: any request may be repeated, here or elsewhere.
    """

    def __init__(self, slots: Slots, kernels: Kernels) -> None:
        """slots: may change while the shard computes. kernels: which made the experts in them."""
        self.slots = slots
        self.kernels = kernels
        self.rows_computed = 0
        """Rows (token, expert pairs) computed so far."""

    @torch.inference_mode()
    def compute(
        self,
        layer: int,
        experts: Sequence[int],
        versions: Sequence[int],
        counts: Sequence[int],
        x_ND: torch.Tensor,
    ) -> torch.Tensor:
        """y_ND for rows sorted by expert: counts[i] rows for experts[i].

        Scores are already applied to x_ND.

        versions: of the experts' weights. Raises NotHeld rather than compute with an expert or a
        version not asked for.
        """
        y_ND = self.kernels.grouped_mlp(x_ND, self.slots.experts(layer, experts, versions), counts)
        self.rows_computed += len(x_ND)
        return y_ND


def shard_bytes(checkpoint: Checkpoint, slots: Iterable[Slot]) -> int:
    """Bytes of the checkpoint that `load_shard` will read, for progress."""
    return sum(checkpoint.expert_bytes(layer) for layer, _ in slots)


def load_shard(
    checkpoint: Checkpoint,
    versions: Mapping[Slot, int],
    kernels: Kernels,
    on_bytes: Callable[[int], None] | None = None,
) -> ExpertShard:
    """Read exactly these slots' experts and lay them out for `kernels`.

    Reads expert by expert, so that a shard never holds a layer twice.
    versions: of the weights that the checkpoint has for each slot. on_bytes: called with each
    piece's size.
    """
    held: dict[Slot, HeldExpert] = {}
    for (layer, expert), version in versions.items():
        gate_up_F2D, down_DF = checkpoint.read_expert(layer, expert, kernels.dtype, on_bytes)
        held[layer, expert] = HeldExpert(
            version, kernels.expert(gate_up_F2D.to(kernels.device), down_DF.to(kernels.device))
        )
    if held:  # compiles loops now, and not in a request
        x_ND = kernels.zeros(1, checkpoint.config.hidden_size)
        kernels.grouped_mlp(x_ND, [next(iter(held.values())).expert], [1])
    slots = Slots()
    slots.change(held)
    return ExpertShard(slots, kernels)

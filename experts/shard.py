"""An expert shard: the weights of some experts of every MoE layer, and what they compute. Knows no transport.

Legend: N rows, D model width, F expert width.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from checkpoint.layout import TensorNames
from checkpoint.tensors import Checkpoint
from experts.errors import ShardRefused
from kernels.grouped_mlp import Expert
from kernels.kernels import Kernels


class ExpertShard:
    """Slots for (layer, expert). Compute is a pure function of them: any request may be repeated elsewhere."""

    def __init__(self, placement_version: int, slots: Mapping[tuple[int, int], Expert], kernels: Kernels) -> None:
        """kernels: which made the experts."""
        self.placement_version = placement_version
        self._slots = dict(slots)
        self.kernels = kernels
        self.rows_computed = 0
        """Rows (token, expert pairs) computed so far."""

    @property
    def slots(self) -> tuple[tuple[int, int], ...]:
        """The (layer, expert) pairs held."""
        return tuple(self._slots)

    @torch.inference_mode()
    def compute(
        self, placement_version: int, layer: int, experts: Sequence[int], counts: Sequence[int], x_ND: torch.Tensor
    ) -> torch.Tensor:
        """y_ND for rows sorted by expert: counts[i] rows for experts[i]. Scores are already applied to x_ND.

        Raises ShardRefused rather than compute with a wrong expert.
        """
        if placement_version != self.placement_version:
            raise ShardRefused(f"placement {placement_version} was asked for, {self.placement_version} is held")
        try:
            held = [self._slots[layer, expert] for expert in experts]
        except KeyError as error:
            raise ShardRefused(f"(layer, expert) {error} is not held here") from None
        y_ND = self.kernels.grouped_mlp(x_ND, held, counts)
        self.rows_computed += len(x_ND)
        return y_ND


def shard_bytes(checkpoint: Checkpoint, experts_of: Mapping[int, Sequence[int]]) -> int:
    """Bytes of the checkpoint that `load_shard` will read, for progress."""
    names, total = TensorNames(checkpoint.config), 0
    for layer, experts in experts_of.items():
        for name in (names.expert_gate_up(layer), names.expert_down(layer)):
            entry = checkpoint.entries[name]
            total += entry.nbytes // entry.shape[0] * len(experts)
    return total


def load_shard(
    checkpoint: Checkpoint,
    placement_version: int,
    experts_of: Mapping[int, Sequence[int]],
    kernels: Kernels,
    on_bytes: Callable[[int], None] | None = None,
) -> ExpertShard:
    """Read exactly the experts in `experts_of` (layer -> experts) and lay them out for `kernels`.

    Reads expert by expert, so that a shard never holds a layer twice. on_bytes: called with each piece's size.
    """
    names = TensorNames(checkpoint.config)
    slots: dict[tuple[int, int], Expert] = {}
    for layer, experts in experts_of.items():
        for expert in experts:
            gate_up_DF2, down_FD = (
                checkpoint.read_rows(name, expert, expert + 1, kernels.dtype, on_bytes)[0].to(kernels.device)
                for name in (names.expert_gate_up(layer), names.expert_down(layer))
            )
            slots[layer, expert] = kernels.expert(gate_up_DF2.t(), down_FD.t())
    if slots:  # compiles loops now, and not in a request
        kernels.grouped_mlp(kernels.zeros(1, checkpoint.config.hidden_size), [next(iter(slots.values()))], [1])
    return ExpertShard(placement_version, slots, kernels)

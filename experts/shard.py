"""An expert shard: the weights of some experts of every MoE layer, and what they compute.

Knows no transport.

Legend: N rows, D model width, F expert width.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from checkpoint.tensors import Checkpoint
from experts.load_pace import LoadPace
from experts.placement import Slot
from experts.slot_loader import SlotLoader
from experts.slots import Slots
from kernels.grouped_mlp import Expert
from kernels.kernels import Kernels


class ExpertShard:
    """Slots, and computing with them.

    That is a pure function: any request may be repeated, here or elsewhere.
    """

    def __init__(self, slots: Slots, kernels: Kernels, loader: SlotLoader | None = None) -> None:
        """slots: may change while the shard computes. kernels: which made the experts in them.

        loader: reads experts that a request needs before the slots are filled.
        """
        self.slots = slots
        self.kernels = kernels
        self._loader = loader
        self.rows_computed = 0
        """Rows (token, expert pairs) computed so far."""
        self.busy_s = 0.0
        """Seconds spent computing so far."""

    @property
    def progress(self) -> tuple[int, int]:
        """Changes whenever an expert is held, or a piece of one is read."""
        return len(self.slots), 0 if self._loader is None else self._loader.bytes_read

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
        if self._loader is not None:
            self._loader.load_now(layer, experts)
        began_s = time.perf_counter()
        y_ND = self.kernels.grouped_mlp(x_ND, self.slots.experts(layer, experts, versions), counts)
        self.rows_computed += len(x_ND)
        self.busy_s += time.perf_counter() - began_s
        return y_ND

    def warm_up(self, hidden_size: int, width: int) -> None:
        """Compile loops now, and not in a request. Only the thread that computes may call it.

        width: of an expert, which is made up where none is held.
        """
        zeros, held = self.kernels.zeros, self.slots.any_expert()
        if held is None:
            held = self.kernels.expert(zeros(2 * width, hidden_size), zeros(hidden_size, width))
        self.kernels.grouped_mlp(zeros(1, hidden_size), [held], [1])


def shard_bytes(checkpoint: Checkpoint, slots: Iterable[Slot]) -> int:
    """Bytes of the checkpoint that a shard of these slots will read, for progress."""
    return sum(checkpoint.expert_bytes(layer) for layer, _ in slots)


def slot_loader(
    checkpoint: Checkpoint,
    slots: Slots,
    versions: Mapping[Slot, int],
    kernels: Kernels,
    on_bytes: Callable[[int], None] | None = None,
    pace: LoadPace | None = None,
) -> SlotLoader:
    """What fills `slots` with exactly these experts of the checkpoint, laid out for `kernels`.

    versions: of the weights that the checkpoint has for each slot. on_bytes: called with each
    piece's size. pace: see SlotLoader.
    """

    def count(size: int) -> None:
        loader.bytes_read += size
        if on_bytes is not None:
            on_bytes(size)

    def read(slot: Slot) -> Expert:
        layer, expert = slot
        gate_up_F2D, down_DF = checkpoint.read_expert(layer, expert, kernels.dtype, count)
        return kernels.expert(gate_up_F2D.to(kernels.device), down_DF.to(kernels.device))

    loader = SlotLoader(slots, versions, read, pace)
    return loader


def load_shard(
    checkpoint: Checkpoint,
    versions: Mapping[Slot, int],
    kernels: Kernels,
    on_bytes: Callable[[int], None] | None = None,
) -> ExpertShard:
    """A shard that holds exactly these slots; see `slot_loader`."""
    slots = Slots()
    slot_loader(checkpoint, slots, versions, kernels, on_bytes).load_all()
    shard = ExpertShard(slots, kernels)
    shard.warm_up(checkpoint.config.hidden_size, checkpoint.config.intermediate_size)
    return shard

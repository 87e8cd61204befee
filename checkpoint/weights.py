"""Reads the tensors that a router holds, onto its device, with progress."""

from collections.abc import Callable

import torch

from checkpoint.layout import Role, tensor_specs
from checkpoint.tensors import Checkpoint


class WeightReader:
    """Reads whole tensors of a checkpoint, in one dtype, onto one device.

    on_bytes: called with the size of each piece read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        self._dtype = dtype
        self._device = device
        self._checkpoint = checkpoint
        self._on_bytes = on_bytes

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor `name`. Raises CheckpointError."""
        rows = self._checkpoint.entries[name].shape[0]
        return self._checkpoint.read_rows(name, 0, rows, self._dtype, self._on_bytes).to(self._device)


def router_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the checkpoint that a router reads: everything but the routed experts."""
    specs = tensor_specs(checkpoint.config)
    return sum(checkpoint.entries[name].nbytes for name, spec in specs.items() if spec.role is not Role.ROUTED_EXPERTS)

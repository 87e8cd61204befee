"""What a process computes with.

`choose_kernels` (kernels/choose.py) makes the one object of a process.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from kernels.attention_loops import AttentionLoops
from kernels.cores import Cores
from kernels.grouped_mlp import Expert, grouped_mlp
from kernels.linear import Linear, TorchLinear
from kernels.norm import Norm, TorchNorm


class Kernels(Protocol):
    """Lays weights out for one device and dtype, and computes with them.

    A process has one of these. Only one thread at a time computes with it.
    cores: which threads compute. attention_loops: None: this device and dtype have none.
    """

    device: torch.device
    dtype: torch.dtype
    cores: Cores
    attention_loops: AttentionLoops | None

    def linear(self, weight_OI: torch.Tensor) -> Linear:
        """A layer of the router's. The weight may be a view; the layer keeps what it needs."""
        ...

    def norm(self, weight_D: torch.Tensor, eps: float) -> Norm: ...

    def expert(self, gate_up_F2D: torch.Tensor, down_DF: torch.Tensor) -> Expert:
        """An expert for `grouped_mlp`, from weights that lie as [out, in]."""
        ...

    def grouped_mlp(self, x_ND: torch.Tensor, experts: Sequence[Expert], counts: Sequence[int]) -> torch.Tensor:
        """y_ND: the first counts[0] rows of x_ND through experts[0], the next counts[1] through
        experts[1], ..."""
        ...

    def zeros(self, *shape: int) -> torch.Tensor:
        """A large tensor of the dtype, on the device.

        On a CPU its memory is taken when it is first written.
        """
        ...


class TorchKernels:
    """Plain torch, on any device and in any dtype."""

    attention_loops: AttentionLoops | None = None

    def __init__(self, device: torch.device, dtype: torch.dtype, cores: Cores) -> None:
        self.device, self.dtype, self.cores = device, dtype, cores

    def linear(self, weight_OI: torch.Tensor) -> Linear:
        return TorchLinear(weight_OI)

    def norm(self, weight_D: torch.Tensor, eps: float) -> Norm:
        return TorchNorm(weight_D, eps)

    def expert(self, gate_up_F2D: torch.Tensor, down_DF: torch.Tensor) -> Expert:
        return Expert(TorchLinear(gate_up_F2D), TorchLinear(down_DF))

    def grouped_mlp(self, x_ND: torch.Tensor, experts: Sequence[Expert], counts: Sequence[int]) -> torch.Tensor:
        return grouped_mlp(x_ND, experts, counts)

    def zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

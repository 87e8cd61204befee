"""The RMS norm before every attention, every MLP and the output head.

The interface, and its implementations.

Legend: T tokens, D model width.
"""

from typing import Protocol

import numpy as np
import torch

from kernels.arrays import as_numpy
from kernels.cpu.rms_norm import rms_norm


class Norm(Protocol):
    """x / rms(x) * weight over each row."""

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Of the shape and dtype of x."""
        ...


class TorchNorm:
    """Normed in fp32 and cast back before the weight is applied, as transformers does."""

    def __init__(self, weight_D: torch.Tensor, eps: float) -> None:
        self._weight_D = weight_D
        self._eps = eps

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        x = x_TD.float()
        return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self._eps)).type_as(x_TD) * self._weight_D


class CpuNorm:
    """fp32 and bf16 on a CPU, in one pass over the row instead of six: 10 us instead of 22 for 32
    rows of 512."""

    def __init__(self, weight_D: torch.Tensor, eps: float) -> None:
        self._weight = as_numpy(weight_D.contiguous())
        self._eps = np.float32(eps)

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        out_TD = torch.empty_like(x_TD)
        rms_norm(as_numpy(x_TD), self._weight, self._eps, as_numpy(out_TD))
        return out_TD

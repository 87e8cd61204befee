"""A linear layer without bias: the interface, and plain torch.

Legend: N rows, I inputs, O outputs.
"""

from typing import Protocol

import torch
import torch.nn.functional as F


class Linear(Protocol):
    """One weight, laid out for the device that computes with it."""

    def __call__(self, x_NI: torch.Tensor) -> torch.Tensor:
        """y_NO = x_NI @ weight_OI.T, in the dtype of x."""
        ...


class TorchLinear:
    """The weight as it is, on any device and in any dtype."""

    def __init__(self, weight_OI: torch.Tensor) -> None:
        self._weight_OI = weight_OI.contiguous()

    def __call__(self, x_NI: torch.Tensor) -> torch.Tensor:
        return F.linear(x_NI, self._weight_OI)

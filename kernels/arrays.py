"""Tensors as NumPy arrays, which compiled loops take."""

import numpy as np
import torch


def as_numpy(x: torch.Tensor) -> np.ndarray:
    """The same memory. bf16 becomes uint16, because NumPy has no such type."""
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()

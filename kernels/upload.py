"""Numbers of the host's on their way to a device, without waiting for it."""

from collections.abc import Sequence

import numpy as np
import torch

ALIGNMENT = 8


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """The arrays as tensors on `device`.

    On a CPU they are the same memory. Elsewhere all of them cross in one copy, out of one pinned
    buffer, for which the host does not wait. torch keeps such a buffer until its copy is done.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    parts, end = [], 0
    for array in arrays:
        parts.append(slice(end, end + array.nbytes))
        end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    pinned = torch.empty(end, dtype=torch.uint8, pin_memory=True)
    bytes_of_all = pinned.numpy()
    for array, part in zip(arrays, parts, strict=True):
        bytes_of_all[part].view(array.dtype).reshape(array.shape)[...] = array
    on_device = pinned.to(device, non_blocking=True)
    return [
        on_device[part].view(torch.from_numpy(np.empty(0, array.dtype)).dtype).view(array.shape)
        for array, part in zip(arrays, parts, strict=True)
    ]

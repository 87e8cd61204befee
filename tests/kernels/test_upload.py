"""Arrays cross to a device in one copy that nobody waits for; on a CPU they are not copied at all."""

import numpy as np
import torch

from kernels.upload import upload
from tests.simulated_gpu import simulated_gpu

ARRAYS = [
    np.array([3, -1, 2], np.int32),
    np.array([[0.1], [1e300]], np.float64),
    np.zeros(0, np.int64),
    np.array([True, False, True]),
    np.arange(12, dtype=np.int64).reshape(3, 4)[:, ::2],
    np.array([0.1], np.float32),
]


def test_on_a_cpu_it_is_the_same_memory() -> None:
    array = np.array([1, 2, 3])
    [tensor] = upload([array], torch.device("cpu"))
    array[1] = 7
    assert tensor.tolist() == [1, 7, 3]


def test_elsewhere_everything_crosses_in_one_copy_without_waiting() -> None:
    with simulated_gpu() as gpu:
        tensors = upload(ARRAYS, gpu.device)
        assert (gpu.copies, gpu.syncs) == (1, [])
        assert all(tensor.is_cuda for tensor in tensors)
        for array, tensor in zip(ARRAYS, tensors, strict=True):
            assert tensor.dtype == torch.from_numpy(array.copy()).dtype
            assert tensor.shape == array.shape
            assert tensor.tolist() == array.tolist()

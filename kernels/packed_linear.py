"""Linear layers whose weight oneDNN has packed for this processor.

Legend: N rows, I inputs, O outputs.
"""

import torch

from kernels.linear import Linear


class OneDnnLinear:
    """oneDNN's blocked layout, which streams 1.5 to 1.9 times as fast as the plain one.

    21-25 GB/s against 11-14: 128 matrices of 2048 x 512 bf16, 2 cores with AVX512-BF16.
    address: of the packed weight in memory, which lives as long as this. The caller's tensor is not kept.
    """

    def __init__(self, weight_OI: torch.Tensor) -> None:
        self.outputs, self.inputs = weight_OI.shape
        self.dtype = weight_OI.dtype
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), 1)
        self.address: int = torch.ops.mkldnn.data_ptr(self._packed)

    def __call__(self, x_NI: torch.Tensor) -> torch.Tensor:
        return on_threads_that_gain(self._product, x_NI, self.outputs, self.inputs)

    def _product(self, x_NI: torch.Tensor) -> torch.Tensor:
        y_NO: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_NI, self._packed, None, "none", [], "")
        return y_NO


def onednn_supports(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in this dtype on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float32:
        return True
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def on_threads_that_gain(product: Linear, x_NI: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """product(x_NI), on one thread if it is small.

    A small product takes 20-40 us on one thread, and little less on two. But where other processes use the cores, two
    threads may wait for each other much longer (0.2-3 ms).
    """
    weights = outputs * inputs
    if weights > 2**19 or len(x_NI) * weights > 2**24:
        return product(x_NI)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return product(x_NI)
    finally:
        torch.set_num_threads(threads)

"""Linear layers whose weight oneDNN or FBGEMM, inside torch, has packed for this processor.

Legend: N rows, I inputs, O outputs.
"""

import math
import mmap

import torch

from kernels.linear import Linear, TorchLinear

_MAX_SCALE_EXPONENT = 100  # 2^100 and its inverse are normal fp32 numbers
# What `on_threads_that_gain` calls small: outputs * inputs, and rows * outputs * inputs computed
# in bf16 or in fp32. The largest small product takes as long in both, on one thread and on two:
# 64 rows of 512 x 512 in bf16 by oneDNN 75 and 46 us; 16 of them by FBGEMM on AVX2 79 and 48 us.
_SMALL_WEIGHT, _SMALL_IN_BF16, _SMALL_IN_FP32 = 2**19, 2**24, 2**22
_SLICE = 2**18  # numbers of a weight that are looked at together, in 4 MB of temporary copies


class OneDnnLinear:
    """oneDNN's blocked layout, which streams 1.5 to 1.9 times as fast as the plain one.

    21-25 GB/s against 11-14: 128 matrices of 2048 x 512 bf16, 2 cores with AVX512-BF16.

    A row's fp32 result has the same bits whatever rows are beside it, and on any number of threads.
    From 2 rows on, oneDNN adds a row's products in one order. A single row has another order there,
    so it is computed as two, which takes 1.2 to 1.45 times as long.

    address: of the packed weight in memory, which lives as long as this. The caller's tensor is
    not kept.
    """

    def __init__(self, weight_OI: torch.Tensor) -> None:
        self.outputs, self.inputs = weight_OI.shape
        self.dtype = weight_OI.dtype
        self._small = _SMALL_IN_FP32 if self.dtype == torch.float32 else _SMALL_IN_BF16
        # For one row of fp32, oneDNN would keep the plain layout, and copy it anew in each product.
        rows = 2 if self.dtype == torch.float32 else 1
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), rows)
        self.address: int = torch.ops.mkldnn.data_ptr(self._packed)

    def __call__(self, x_NI: torch.Tensor) -> torch.Tensor:
        return on_threads_that_gain(self._product, x_NI, self.outputs, self.inputs, self._small)

    def _product(self, x_NI: torch.Tensor) -> torch.Tensor:
        if len(x_NI) == 1 and self.dtype == torch.float32:
            return self._product(torch.cat((x_NI, x_NI)))[:1]
        y_NO: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_NI, self._packed, None, "none", [], "")
        return y_NO


class Fp16Linear:
    """bf16 rows and weight, computed by FBGEMM: weight packed as fp16, rows and sums in fp32.

    The weight is multiplied by a power of two first, so that its largest value is among fp16's
    largest. Without that hardly any layer would qualify: of weights with standard deviation 0.02,
    one in 3000 is below 2^-17, where fp16 loses bits of bf16.

    The rows are divided by the same power. So each product and each sum is what an fp32 product of
    the weight itself has, and overflows only where that does. A tiny row may lose bits as a
    subnormal, at most half of bf16's smallest number, 2^-133, in each product.
    """

    def __init__(self, weight_OI: torch.Tensor, scale: float) -> None:
        """scale: from `fp16_scale`."""
        self._outputs, self._inputs = weight_OI.shape
        self._row_scale = 1 / scale
        # One fp32 copy and no more: the largest weights have 4 GB in fp32.
        scaled_OI = _temporary_fp32(weight_OI.shape).copy_(weight_OI).mul_(scale)
        self._packed = torch.ops.quantized.linear_prepack_fp16(scaled_OI, None)

    def __call__(self, x_NI: torch.Tensor) -> torch.Tensor:
        return on_threads_that_gain(self._product, x_NI, self._outputs, self._inputs, _SMALL_IN_FP32)

    def _product(self, x_NI: torch.Tensor) -> torch.Tensor:
        y_NO: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(x_NI.float() * self._row_scale, self._packed)
        return y_NO.type_as(x_NI)

    @staticmethod
    def is_available() -> bool:
        """Whether torch packs with FBGEMM here."""
        return torch.backends.quantized.engine in ("x86", "fbgemm")


def _temporary_fp32(shape: torch.Size) -> torch.Tensor:
    """An empty fp32 tensor whose memory goes back to the system when it is freed.

    malloc would keep the memory, as holes between packed weights. `maverick-mini`, 862 M weights,
    then took 3.4 GB in one process instead of 2.4.
    """
    return torch.frombuffer(mmap.mmap(-1, 4 * shape.numel()), dtype=torch.float32).view(shape)


def fp16_scale(weight_OI: torch.Tensor) -> float | None:
    """The power of two that scales the largest weight to 2^15..2^16.

    None: fp16 cannot hold the weight. Either it loses bits of some number after scaling, or the
    largest is 2^16 or more: dividing by the power would then enlarge the rows, which may overflow.

    bf16 has 8 significant bits, and fp16's smallest step is 2^-24. So a number of 2^-17 or more
    after scaling is exact, which is 2^-33 of the largest. A smaller one is if its last bits are 0.
    """
    slices = weight_OI.split(max(1, _SLICE // max(1, weight_OI.shape[1])))
    largest = max((float(part.abs().max()) for part in slices if part.numel()), default=0.0)
    exponent = min(16 - math.frexp(largest)[1], _MAX_SCALE_EXPONENT)
    if exponent < 0 or not all(_is_exact_in_fp16(part.float() * 2.0**exponent) for part in slices):
        return None
    return 2.0**exponent


def _is_exact_in_fp16(weight_OI: torch.Tensor) -> bool:
    return torch.equal(weight_OI.half().float(), weight_OI)


class Fp32Linear:
    """bf16 rows, a weight kept in fp32, and an fp32 product: for weights that fp16 cannot hold."""

    def __init__(self, weight_OI: torch.Tensor) -> None:
        self._product: Linear
        if torch.backends.mkldnn.is_available():
            self._product = OneDnnLinear(weight_OI.float())
        else:
            self._product = TorchLinear(weight_OI.float())

    def __call__(self, x_NI: torch.Tensor) -> torch.Tensor:
        return self._product(x_NI.float()).type_as(x_NI)


class OneRowApart:
    """One layer that exists twice: `one` computes a single row, `several` any other number."""

    def __init__(self, one: Linear, several: Linear) -> None:
        self.one, self.several = one, several

    def __call__(self, x_NI: torch.Tensor) -> torch.Tensor:
        return self.one(x_NI) if len(x_NI) == 1 else self.several(x_NI)


def pack_without_bf16_products(weight_OI: torch.Tensor) -> Linear:
    """FBGEMM's fp16 product where it is exact, otherwise an fp32 one.

    For bf16 on x86 without AVX512-BF16.
    """
    scale = fp16_scale(weight_OI)
    return Fp32Linear(weight_OI) if scale is None else Fp16Linear(weight_OI, scale)


def pack_twice(weight_OI: torch.Tensor) -> Linear:
    """The same, and beside it the weight in bf16, for torch's bf16 product of one row.

    On AVX2 alone that product is slow for several rows and fast for one. One stream of
    `maverick-mini` on 2 cores of Zen 3 decoded 69 tokens/s so, and 53 by FBGEMM. With AVX-512,
    torch takes another way, up to 70 times slower.
    """
    return OneRowApart(TorchLinear(weight_OI), pack_without_bf16_products(weight_OI))


def onednn_supports(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in this dtype on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float32:
        return True
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def on_threads_that_gain(product: Linear, x_NI: torch.Tensor, outputs: int, inputs: int, small: int) -> torch.Tensor:
    """product(x_NI), on one thread if the weight and the product are small.

    small: the most rows * outputs * inputs of a small product.

    A second thread saves a small product at most 30 us, and mostly less than 10. But where other
    processes use the cores, two threads may wait for each other much longer (0.2-3 ms).
    """
    weights = outputs * inputs
    if weights > _SMALL_WEIGHT or len(x_NI) * weights > small:
        return product(x_NI)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return product(x_NI)
    finally:
        torch.set_num_threads(threads)

"""Chooses a process's kernels. Nothing else in Drover asks for the device, the dtype or the processor to decide."""

from collections.abc import Callable

import torch

from kernels.attention_loops import AttentionLoops
from kernels.cores import Cores
from kernels.cpu.processor import Processor, this_processor
from kernels.cpu_kernels import CpuKernels
from kernels.kernels import Kernels, TorchKernels
from kernels.linear import Linear, TorchLinear
from kernels.norm import CpuNorm, TorchNorm
from kernels.packed_linear import (
    Fp16Linear,
    OneDnnLinear,
    onednn_supports,
    pack_for_avx2,
    pack_without_bf16_products,
)


def choose_kernels(
    device: torch.device, dtype: torch.dtype, threads: int, processor: Processor | None = None
) -> Kernels:
    """The fastest known kernels. threads: to compute with; torch's number of threads in the thread that computes.

    processor: none means this machine's, as DROVER_ISA lowers it.
    """
    cores = Cores(threads, "kernels")
    if device.type != "cpu":
        return TorchKernels(device, dtype, cores)
    processor = processor or this_processor()
    has_loops = dtype in (torch.float32, torch.bfloat16)
    return CpuKernels(
        dtype,
        cores,
        pack=_packing(dtype, processor),
        streams=dtype == torch.bfloat16 and processor.avx512_bf16,
        norm=CpuNorm if has_loops else TorchNorm,
        attention_loops=AttentionLoops(cores, dtype == torch.bfloat16 and processor.amx) if has_loops else None,
    )


def _packing(dtype: torch.dtype, processor: Processor) -> Callable[[torch.Tensor], Linear]:
    lacks_bf16 = dtype == torch.bfloat16 and processor.avx2 and not processor.avx512_bf16
    if lacks_bf16 and Fp16Linear.is_available():
        return pack_without_bf16_products if processor.avx512 else pack_for_avx2
    return OneDnnLinear if onednn_supports(dtype) else TorchLinear

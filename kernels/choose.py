"""Chooses a process's kernels.

Nothing else in Drover asks for the device, the dtype or the processor to decide.
"""

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
    pack_twice,
    pack_without_bf16_products,
)

Pack = Callable[[torch.Tensor], Linear]


def choose_kernels(
    device: torch.device, dtype: torch.dtype, threads: int, processor: Processor | None = None
) -> Kernels:
    """The fastest known kernels for a device and dtype.

    threads: how many compute. The thread that calls the kernels must have this torch thread count.
    processor: by default this machine's, lowered to DROVER_ISA if that is set.
    Raises DroverError if DROVER_ISA names no level.
    """
    cores = Cores(threads, "kernels")
    if device.type != "cpu":
        return TorchKernels(device, dtype, cores)
    processor = processor or this_processor()
    pack_layer, pack_expert = _packing(dtype, processor)
    has_loops = dtype in (torch.float32, torch.bfloat16)
    return CpuKernels(
        dtype,
        cores,
        pack_layer=pack_layer,
        pack_expert=pack_expert,
        streams=dtype == torch.bfloat16 and processor.avx512_bf16,
        norm=CpuNorm if has_loops else TorchNorm,
        attention_loops=AttentionLoops(cores, dtype == torch.bfloat16 and processor.amx) if has_loops else None,
    )


def _packing(dtype: torch.dtype, processor: Processor) -> tuple[Pack, Pack]:
    """How `linear` and `expert` pack a weight.

    With AVX2 alone, bf16 layers exist twice for the sake of one row: see `pack_twice`. They take
    4 bytes a weight, or 6 where fp16 loses bits. Experts, among them dense and shared MLPs, are
    nearly all of the weights. They exist once, with 2 bytes a weight, or 4 where fp16 loses bits.
    """
    lacks_bf16 = dtype == torch.bfloat16 and processor.avx2 and not processor.avx512_bf16
    if lacks_bf16 and Fp16Linear.is_available():
        return pack_without_bf16_products if processor.avx512 else pack_twice, pack_without_bf16_products
    pack: Pack = OneDnnLinear if onednn_supports(dtype) else TorchLinear
    return pack, pack

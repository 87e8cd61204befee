"""What this machine's processor can do. Detected here, and asked for nowhere else.

DROVER_ISA=avx2|avx512|avx512_bf16|amx lowers the answer, for tests and measurements only. It
chooses among our kernels. The libraries inside torch have switches of their own:
ATEN_CPU_CAPABILITY=avx2, ONEDNN_MAX_CPU_ISA=AVX2 and FBGEMM_ENABLE_INSTRUCTIONS=AVX2.
"""

import ctypes
import os
import sys
from dataclasses import dataclass
from functools import cache

import llvmlite.binding

from checkpoint.errors import DroverError

LEVELS = ("avx2", "avx512", "avx512_bf16", "amx")
VARIABLE = "DROVER_ISA"
# Linux lets a process use tiles once it has asked:
# arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA).
_ARCH_PRCTL, _REQUEST, _TILE_DATA = 158, 0x1023, 18


@dataclass(frozen=True)
class Processor:
    """Instruction sets.

    avx512: F, BW, DQ and VL, which oneDNN needs for bf16. amx: bf16 tiles, usable here.
    """

    avx2: bool
    avx512: bool
    avx512_bf16: bool
    amx: bool

    def lowered_to(self, level: str) -> "Processor":
        """The same without what is above `level`. Raises DroverError if LEVELS lacks it."""
        if level not in LEVELS:
            raise DroverError(f"{VARIABLE} is {level!r}; it must be one of {', '.join(LEVELS)}")
        kept = LEVELS[: LEVELS.index(level) + 1]
        return Processor(**{each: getattr(self, each) and each in kept for each in LEVELS})


@cache
def detect() -> Processor:
    """The processor as it is, whatever DROVER_ISA says."""
    try:
        features = llvmlite.binding.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know this system
        features = {}
    return Processor(
        avx2=bool(features.get("avx2")),
        avx512=all(features.get(f"avx512{part}") for part in ("f", "bw", "dq", "vl")),
        avx512_bf16=bool(features.get("avx512bf16")),
        amx=bool(features.get("amx-tile") and features.get("amx-bf16")) and _may_use_tiles(),
    )


@cache
def this_processor() -> Processor:
    """The processor that kernels are chosen for.

    Raises DroverError if DROVER_ISA names no level.
    """
    level = os.environ.get(VARIABLE)
    return detect().lowered_to(level) if level else detect()


def _may_use_tiles() -> bool:
    return sys.platform == "linux" and ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST, _TILE_DATA) == 0

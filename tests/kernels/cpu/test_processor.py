"""No test of an instruction set is skipped where the machine has it.

Tests of AMX and AVX-512 skip where `processor.py` finds none. Should it miss what is there, they would all skip in
silence. So it must find what the system lists, and what DROVER_TEST_ISA says: the highest level of this machine.
"""

import os
import re
from pathlib import Path

import pytest
import torch

from checkpoint.errors import DroverError
from kernels.cpu.processor import LEVELS, VARIABLE, Processor, detect
from kernels.packed_linear import Fp16Linear, onednn_supports

# How Linux spells what each level needs.
FLAGS = {
    "avx2": {"avx2"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_bf16": {"avx512_bf16"},
    "amx": {"amx_tile", "amx_bf16"},
}


def listed_by_linux() -> set[str]:
    found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    return {level for level, needed in FLAGS.items() if needed <= flags}


def said_by_whoever_runs_this() -> set[str]:
    level = os.environ.get("DROVER_TEST_ISA")
    if not level:
        return set()
    assert level in LEVELS, f"DROVER_TEST_ISA is {level!r}; it must be one of {', '.join(LEVELS)}"
    return set(LEVELS[: LEVELS.index(level) + 1])


def test_what_this_machine_has_is_found() -> None:
    found = {level for level in LEVELS if getattr(detect(), level)}
    assert found >= listed_by_linux() | said_by_whoever_runs_this()


@pytest.mark.skipif(
    any(os.environ.get(name) for name in (VARIABLE, "ONEDNN_MAX_CPU_ISA", "FBGEMM_ENABLE_INSTRUCTIONS")),
    reason="a lesser processor is emulated",
)
def test_the_libraries_use_what_this_machine_has() -> None:
    levels = listed_by_linux() | said_by_whoever_runs_this()
    assert Fp16Linear.is_available() >= ("avx2" in levels)
    assert onednn_supports(torch.bfloat16) >= ("avx512" in levels)


def test_a_level_is_lowered_and_never_raised() -> None:
    everything = Processor(avx2=True, avx512=True, avx512_bf16=True, amx=True)
    assert everything.lowered_to("avx512") == Processor(avx2=True, avx512=True, avx512_bf16=False, amx=False)
    assert Processor(avx2=True, avx512=False, avx512_bf16=False, amx=False).lowered_to("amx").amx is False
    with pytest.raises(DroverError, match="DROVER_ISA is 'sse'; it must be one of avx2"):
        everything.lowered_to("sse")

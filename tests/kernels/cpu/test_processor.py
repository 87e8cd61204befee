"""What the processor can do, how tests lower it, and that no test is skipped for want of what is there.

Tests of AMX and AVX-512 skip where `processor.py` finds none. Should it miss what is there, they would all skip in
silence. So it must find what the system lists, and what DROVER_TEST_ISA says: the highest level of this machine. Where
that is the highest of all, a skip in tests/kernels is a failure (conftest.py).
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoint.errors import DroverError
from kernels.cpu.processor import LEVELS, VARIABLE, Processor, detect
from kernels.packed_linear import Fp16Linear, onednn_supports
from tests.command import ROOT, drover_process
from tests.kernels.conftest import said_by_whoever_runs_this

EVERYTHING = Processor(avx2=True, avx512=True, avx512_bf16=True, amx=True)
ASK = "from kernels.cpu.processor import detect, this_processor; print(this_processor() == detect().lowered_to('avx2'))"


@pytest.mark.parametrize("level", LEVELS)
def test_lowering_takes_what_is_above_and_nothing_else(level: str) -> None:
    lowered = EVERYTHING.lowered_to(level)
    assert [name for name in LEVELS if getattr(lowered, name)] == list(LEVELS[: LEVELS.index(level) + 1])


def test_lowering_adds_nothing() -> None:
    plain = Processor(avx2=True, avx512=False, avx512_bf16=False, amx=False)
    assert plain.lowered_to("amx") == plain


def test_higher_levels_imply_lower_ones_here() -> None:
    processor = detect()
    assert processor.avx2 or not processor.avx512
    assert processor.avx512 or not processor.avx512_bf16


def test_an_unknown_level_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(DroverError, match="DROVER_ISA is 'avx3'; it must be one of avx2, avx512, avx512_bf16, amx"):
        EVERYTHING.lowered_to("avx3")


def test_a_command_refuses_an_unknown_level_in_one_line() -> None:
    environment = {**os.environ, "DROVER_ISA": "foo"}
    done = drover_process("generate", "Hi", "--checkpoint", ROOT / "demo" / "drover-demo", env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "drover: error: DROVER_ISA is 'foo'; it must be one of avx2, avx512, avx512_bf16, amx\n"


def test_the_environment_lowers_this_processor() -> None:
    environment = {**os.environ, "DROVER_ISA": "avx2"}
    answer = subprocess.run(
        [sys.executable, "-c", ASK], env=environment, check=True, capture_output=True, text=True, timeout=60
    )
    assert answer.stdout == "True\n"


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

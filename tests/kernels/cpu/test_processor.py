"""What the processor can do, and how tests lower it."""

import os
import subprocess
import sys

import pytest

from checkpoint.errors import DroverError
from kernels.cpu.processor import LEVELS, Processor, detect
from tests.command import ROOT, drover_process

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

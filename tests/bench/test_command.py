"""The command line: help that teaches, and mistakes that are one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench import __main__ as command
from bench.systems import NAMES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--systems", "drover,sglang"],
            "'sglang' is no system; known are drover, drover-one-process, llama.cpp, vllm",
        ),
        (["--parts", "all"], "'all' is no part; known are closed, open, prefix, shards, long"),
        (["--concurrency", "8,x"], "'x' is no whole number from 1 to 1000"),
        (["--concurrency", "999"], "999 streams are more than 256"),
        (["--repeats", "0"], "'0' is no whole number from 1 to 1000"),
        (["--rates", "1,-2"], "'1,-2' are no rates above 0 and at most 1000, such as 1,2,4"),
        (["--shards", "two"], "'two' is no whole number from 1 to 1000"),
    ],
)
def test_wrong_usage_names_what_is_valid(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(arguments)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--checkpoint", "/nowhere"], "/nowhere/config.json is missing"),
        (["--out", "/nowhere/results.json"], "--out is /nowhere/results.json, whose folder does not exist"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == 1
    assert capsys.readouterr().err.startswith(f"bench: error: {said}")


def test_the_list_of_names_is_that_of_the_code() -> None:
    assert command.SYSTEMS == NAMES


@pytest.mark.parametrize("module", ["bench", "bench.plot"])
def test_commands_run_as_modules(module: str, tmp_path: Path) -> None:
    arguments = ["--help"] if module == "bench" else [str(tmp_path / "absent.json")]
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == (0 if module == "bench" else 1)
    assert "--quick" in done.stdout or "does not exist; `make bench` writes it" in done.stderr

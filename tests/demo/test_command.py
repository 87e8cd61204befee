"""What a user can mend is one line and an exit code, for every command of the room."""

import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint.errors import CheckpointError
from demo.command import exit_code

ROOT = Path(__file__).parents[2]


def raising(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (CheckpointError("config.json is missing"), 1, "error: config.json is missing\n"),
        (PermissionError(13, "Permission denied", "/out.npz"), 1, "error: [Errno 13] Permission denied: '/out.npz'\n"),
        (KeyboardInterrupt(), 130, "\nstopped; the same command goes on with what is not done yet\n"),
    ],
    ids=["checkpoint", "system", "interrupt"],
)
def test_an_end_is_one_line(error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda: raising(error)) == code
    assert capsys.readouterr().err == said


def test_our_own_mistakes_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: raising(ZeroDivisionError()))


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--threads", "0"),
        ("train", "--tokens", "many"),
        ("evaluate", "--threads", "-1"),
        ("compare", "--seeds", "0"),
        ("compare", "--minutes", "0"),
    ],
    ids=" ".join,
)
def test_a_number_that_makes_no_sense_is_named(arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", f"demo.{arguments[0]}", *arguments[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert arguments[1] in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr

"""What a command loads: who talks, looks or stops starts at once, and needs neither torch nor a model's packages."""

import os
import subprocess
import sys

import pytest

from tests.command import ROOT
from tests.loopback import PATIENCE_S

# The last line of stdout tells the exit code and those of the modules asked about that were loaded.
PROGRAM = """
import json, sys
asked, statement = sys.argv[1].split(), sys.argv[2]
sys.argv[1:3] = []
code = 0
try:
    exec(statement)
except SystemExit as end:
    code = end.code
print("\\n" + json.dumps([code, sorted(set(asked) & set(sys.modules))]))
"""
COMMAND = "from cli.main import main; code = main(sys.argv[1:])"
MODEL = "torch numba llvmlite tokenizers"
NOBODYS = ("--namespace", "nobodys")


def loaded(asked: str, statement: str, *arguments: str, stdin: str = "") -> str:
    """JSON: the exit code of `statement` in a fresh interpreter, and which of the `asked` modules it has loaded."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, asked, statement, *arguments],
        input=stdin, capture_output=True, text=True, timeout=PATIENCE_S, cwd=ROOT, check=False,
        env=os.environ | {"RAY_ADDRESS": "127.0.0.1:1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("command", ["", "generate", "chat", "serve", "status", "stop", "demo", "checkpoint"])
def test_help_loads_nothing(command: str) -> None:
    assert loaded(f"{MODEL} ray frontend cluster", COMMAND, *command.split(), "--help") == "[0, []]"


@pytest.mark.parametrize("command", ["generate Hi", "chat"])
def test_talking_to_a_server_loads_no_ray_and_no_model(address: str, command: str) -> None:
    arguments = (*command.split(), "--address", address)
    assert loaded(f"{MODEL} ray frontend cluster", COMMAND, *arguments, stdin="Hi\n") == "[0, []]"


@pytest.mark.parametrize("command", ["status", "stop"])
def test_looking_for_a_deployment_loads_no_model(command: str) -> None:
    """Nothing runs there, and the exit code says so; what was imported is what looking at a deployment takes."""
    assert loaded(MODEL, COMMAND, command, *NOBODYS) == "[1, []]"
    needed = {"status": "import cluster.status", "stop": "import cluster.teardown"}[command]
    assert loaded(MODEL, needed) == "[0, []]"


def test_a_frontend_replica_loads_no_torch() -> None:
    """It encodes text and holds streams; tokenizers is all that it needs of a model."""
    assert loaded("torch numba llvmlite", "import cluster.serve_app") == "[0, []]"

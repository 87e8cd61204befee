"""What a command loads: who talks, looks or stops starts at once, and needs neither torch nor a model's packages.

tests/cluster/ asks the same of a replica that serves, and of `status` and `stop` where something runs.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import ROOT, RUN_COMMAND, watched
from tests.processes import PATIENCE_S

MODEL = "torch numba llvmlite tokenizers"


@pytest.mark.parametrize(
    "command", ["", "generate", "chat", "serve", "status", "drain", "stop", "simulate", "demo", "checkpoint"]
)
def test_help_loads_nothing(command: str) -> None:
    done = watched(f"{MODEL} ray frontend cluster", RUN_COMMAND, *command.split(), "--help")
    assert (done.returncode, done.loaded) == (0, [])


@pytest.mark.parametrize("command", ["generate Hi", "chat"])
def test_talking_to_a_server_loads_no_ray_and_no_model(address: str, command: str) -> None:
    arguments = (*command.split(), "--address", address)
    done = watched(f"{MODEL} ray frontend cluster", RUN_COMMAND, *arguments, stdin="Hi\n")
    assert (done.returncode, done.loaded) == (0, [])


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("status", "cluster.status"),
        ("stop", "cluster.teardown"),
        ("drain router-0", "cluster.controller_client"),
    ],
)
def test_looking_where_nothing_runs_loads_no_model(command: str, module: str) -> None:
    nowhere = os.environ | {"RAY_ADDRESS": "127.0.0.1:1"}
    done = watched(MODEL, RUN_COMMAND, *command.split(), "--namespace", "nobodys", env=nowhere)
    assert (done.returncode, done.loaded) == (1, [])
    assert "nothing runs in namespace 'nobodys'" in done.stderr  # and it did not wait for a Ray that is gone
    assert watched(MODEL, f"import {module}").loaded == []


def test_a_frontend_loads_no_torch() -> None:
    """It encodes text and holds streams; tokenizers is all that it needs of a model."""
    assert watched("torch numba llvmlite", "import cluster.serve_app").loaded == []


def test_a_module_of_the_working_directory_does_not_take_the_place_of_ours(tmp_path: Path) -> None:
    """An empty entry in PYTHONPATH stands for the working directory."""
    for name in ("client", "checkpoint", "router"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')")
    script = "import sys; sys.path.insert(0, ''); sys.argv = ['drover', '--help']; import cli.main; cli.main.main()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), ""])}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "serve" in done.stdout

"""`drover checkpoint make` and `drover checkpoint inspect`, as a user runs them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint.shape import SHAPES
from cli import checkpoint
from tests.command import ROOT, drover
from tests.processes import PATIENCE_S

SMALL = (
    *(
        "--shape",
        "scout",
        "--layers",
        "4",
        "--hidden-size",
        "64",
        "--heads",
        "4",
        "--kv-heads",
        "2",
        "--head-dim",
        "16",
    ),
    *("--expert-size", "32", "--vocab-size", "300", "--chunk-size", "16", "--rope-scaling", "8,1,4,64"),
    *("--no-qk-norm", "--dtype", "float32", "--std", "0.2"),
)


def checkpoint_command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return drover("checkpoint", *arguments)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint made by the command, for tests to read."""
    directory = tmp_path_factory.mktemp("made") / "checkpoint"
    done = checkpoint_command("make", directory, *SMALL)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{directory}: 510.0 K parameters, 141.4 K active per token, 2.0 MB in 1 file\n"
    return directory


def test_what_was_made_is_what_the_options_ask_for(made: Path) -> None:
    done = checkpoint_command("inspect", made, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    config = report["config"]
    assert (len(config["layers"]), config["hidden_size"], config["num_experts"]) == (4, 64, 16)
    assert (config["num_heads"], config["num_kv_heads"], config["head_dim"]) == (4, 2, 16)
    assert config["rope_scaling"] == {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_positions": 64,
    }
    assert (config["use_qk_norm"], config["dtype"], report["dtypes"]) == (False, "float32", ["F32"])


def test_inspect_shows_a_table(made: Path) -> None:
    done = checkpoint_command("inspect", made)
    assert (done.returncode, done.stderr) == (0, "")
    rows = {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in done.stdout.splitlines() if "  " in line}
    assert rows["layers"] == "4: 4 MoE, 0 dense"
    assert rows["experts"] == "16 per MoE layer, 1 per token, 1 shared"
    assert rows["KV cache"] == "256 bytes per token in global layers"
    assert rows["tokenizer"] == "yes"
    assert done.stdout.endswith("no problems\n")


def test_inspect_exits_with_1_where_there_are_problems(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2"]}')
    done = checkpoint_command("inspect", tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    problems = [line for line in done.stdout.splitlines() if line.startswith("problem: ")]
    assert len(problems) == 3
    assert "architectures is 'GPT2' and model_type ''; Drover serves Llama4ForCausalLM" in problems[0]


def test_make_refuses_a_directory_that_is_not_empty(made: Path) -> None:
    done = checkpoint_command("make", made)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"drover: error: {made} is not empty; name another directory, or ask for --overwrite\n"


def test_a_bad_option_is_one_line_of_error(tmp_path: Path) -> None:
    done = checkpoint_command("make", tmp_path / "out", "--head-dim", "15")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "drover: error: the shape asked for: head_dim is 15; it must be even, for rotary pairs\n"


@pytest.mark.parametrize("action", ["make", "inspect"])
def test_help_teaches_with_an_example(action: str) -> None:
    done = checkpoint_command(action, "--help")
    assert done.returncode == 0
    assert f"\n  drover checkpoint {action} /" in done.stdout


def test_help_does_not_import_torch() -> None:
    program = "import sys, cli.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=PATIENCE_S).returncode == 0


def test_the_shapes_on_offer_are_those_that_exist() -> None:
    assert set(checkpoint.SHAPES) == set(SHAPES)

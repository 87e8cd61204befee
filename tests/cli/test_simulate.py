"""`drover simulate` on the command line."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.command import Screen, drover, start
from tests.processes import PATIENCE_S

SHORT = ("--set", "duration_s=5")


def test_it_prints_a_table_and_the_whole_run_in_a_line() -> None:
    done = drover("simulate", *SHORT)
    assert (done.returncode, done.stderr.strip()) == (0, "")
    assert "gap p50" in done.stdout
    assert "tokens in 5 s" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_the_json_holds_what_was_simulated_and_what_came_of_it(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    assert drover("simulate", *SHORT, "--set", "shards.count=7", "--json", path).returncode == 0
    result = json.loads(path.read_text())
    assert result["scenario"]["shards"]["count"] == 7
    assert [row["time_s"] for row in result["series"]] == [1.0, 2.0, 3.0, 4.0, 5.0]
    printed = drover("simulate", *SHORT, "--set", "shards.count=7", "--json", "-")
    assert json.loads(printed.stdout) == result  # and nothing else on stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "shards.count=0"), "shards.count is 0: input should be greater than or equal to 1"),
        (("--json", "/no/such/folder/x.json"), "--json is /no/such/folder/x.json, whose folder does not exist"),
        (("none.yaml",), "none.yaml does not exist; deploy/simulation.yaml is an example of a scenario file"),
        (("--set", "routing.source=trace", "--set", "routing.trace=none.npz"), "routing.trace is none.npz, which does"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = drover("simulate", *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_plot_without_matplotlib_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = drover("simulate", "--set", "duration_s=1000000", "--plot", tmp_path / "x.png")
    assert (done.returncode, "pip install 'matplotlib>=3.8'" in done.stderr) == (1, True)


def test_ctrl_c_ends_it_and_says_how_far_it_was(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    terminal, stderr = os.openpty()
    environment = os.environ | {"TERM": "xterm"}
    arguments = ("simulate", "--set", "duration_s=1000000", "--json", str(path))
    try:
        with start(*arguments, env=environment, stderr=stderr) as process:
            screen = Screen(terminal)
            screen.read_until(b"simulating")  # a bar
            process.send_signal(signal.SIGINT)
            screen.read_until(b"s of 1000000 s; nothing was written")
            assert process.wait(PATIENCE_S) == 130
    finally:
        os.close(terminal)
        os.close(stderr)
    assert not path.exists()

"""The fault bench's command line: what it takes, refuses and teaches."""

import pytest

from bench.chaos.__main__ import main, parser
from bench.chaos.bench import Plan
from bench.chaos.schedule import MODES, TARGETS


def test_help_names_every_mode_and_target(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    for name in (*MODES, *TARGETS):
        assert f"\n  {name} " in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--modes", "fire"], "'fire' is no mode; known are crash, stop"),
        (["--targets", "shard,moon"], "'moon' is no target; known are shard, minority"),
        (["--targets", "slow:router"], "'slow:router' is no target; known are shard, minority"),
        (["--cycles", "0"], "'0' is no whole number from 1 to 1000"),
        (["--seed", "x"], "'x' is no whole number from 0 to"),
    ],
)
def test_wrong_usage_names_the_value_and_what_is_valid(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_told_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", "/nowhere/chaos.json"]) == 1
    assert "--out is /nowhere/chaos.json, whose folder does not exist" in capsys.readouterr().err


def test_a_plan_is_what_the_flags_say() -> None:
    plan = Plan.of(parser().parse_args(["--seed", "7", "--modes", "stop", "--replicas", "1", "--no-points"]))
    assert (plan.seed, plan.modes, plan.shape.replicas, plan.points) == (7, ("stop",), 1, False)

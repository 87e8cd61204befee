"""The commands that change a running deployment: what they ask its controller, and what they print."""

import json
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from cli import abort, autoscale, drain, events, operation, rebalance, resize, undrain
from cli.main import main
from cluster.controller_client import ControllerClient
from cluster.reports import OperationStatus, RebalanceReport
from tests.cluster.small_controller import SmallController

RESIZE = ("resize", "--shards", "3", "--operation-id", "resize-1")
RUNS = OperationStatus("resize-1", "resize", "prepare", "3 shards", 1, 2, "shard-2: 12 experts missing", 2**20, 2**22)


class LocalClient(ControllerClient):
    """Asks a controller in this process; at each question after the first, `meanwhile` changes something."""

    def __init__(self, controller: SmallController, meanwhile: Iterator[Callable[[], None]]) -> None:
        super().__init__("drover-test")
        self._controller, self._meanwhile = controller, meanwhile

    def _ask(self, method: str, *arguments: Any) -> Any:
        answer = getattr(self._controller, method)(*arguments)
        next(self._meanwhile, lambda: None)()
        return answer


@pytest.fixture
def controller() -> SmallController:
    return SmallController()


@pytest.fixture
def meanwhile(controller: SmallController, monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """What happens after each answer of the controller, one after the other. Commands ask it at once."""
    steps: list[Callable[[], None]] = []

    def taken() -> Iterator[Callable[[], None]]:
        while steps:
            yield steps.pop(0)

    @contextmanager
    def connected(args: Any) -> Iterator[ControllerClient]:
        yield LocalClient(controller, taken())

    for command in (abort, autoscale, drain, events, rebalance, resize):
        monkeypatch.setattr(command, "connected_controller", connected)
    monkeypatch.setattr(operation, "LOOK_S", 0.0)
    monkeypatch.setattr(events, "FOLLOW_S", 0.0)
    return steps


Said = tuple[int, str, str]


@pytest.fixture
def drover(capsys: pytest.CaptureFixture[str], meanwhile: object) -> Callable[..., Said]:
    def run(*arguments: str) -> Said:
        try:
            code = main(arguments)
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return code, *capsys.readouterr()

    return run


def test_a_resize_is_followed_to_its_end(
    drover: Callable[..., Said], controller: SmallController, meanwhile: list[Callable[[], None]]
) -> None:
    commit = replace(RUNS, phase="commit", step=2, waits_for="", moved_bytes=2**22)
    meanwhile += [
        lambda: setattr(controller, "running", RUNS),
        lambda: None,  # nothing new: no line
        lambda: setattr(controller, "running", commit),
        lambda: controller.end(replace(commit, phase="done")),
    ]
    code, out, err = drover(*RESIZE, "--routers", "2")
    assert controller.asked == [("resize", "resize-1", 3, 2, None, None)]
    assert code == 0
    assert re.fullmatch(r"resize-1 \(3 shards\): done after \d+\.\d s, 4\.0 MiB moved\n", out)
    assert err.splitlines() == [
        "resize-1 (3 shards): prepare, step 1 of about 2, 1.0 MiB of 4.0 MiB: shard-2: 12 experts missing",
        "resize-1 (3 shards): commit, step 2 of about 2, 4.0 MiB of 4.0 MiB",
    ]


def test_a_terminal_gets_a_bar(
    drover: Callable[..., Said],
    controller: SmallController,
    meanwhile: list[Callable[[], None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("COLUMNS", "120")
    meanwhile += [
        lambda: setattr(controller, "running", replace(RUNS, waits_for="shard-2: [12] missing")),
        lambda: None,
        lambda: controller.end(replace(RUNS, phase="done")),
    ]
    code, out, err = drover(*RESIZE)
    assert code == 0
    assert "done after" in out
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err)
    assert "resize-1 (3 shards) prepare 1/2 ━━━━╺" in text  # a quarter of the bytes
    assert "shard-2: [12] missing" in text  # no markup


def test_its_end_as_json_alone_on_stdout(
    drover: Callable[..., Said], controller: SmallController, meanwhile: list[Callable[[], None]]
) -> None:
    meanwhile += [lambda: controller.end(replace(RUNS, phase="done"))]
    code, out, _ = drover(*RESIZE, "--json")
    assert (code, json.loads(out)["phase"], json.loads(out)["operation_id"]) == (0, "done", "resize-1")


def test_without_waiting_it_is_named(drover: Callable[..., Said]) -> None:
    code, out, err = drover("resize", "--shards", "3", "--no-wait")
    assert re.fullmatch(
        r"resize-[0-9a-f]{8} \(3 shards\): prepare, step 1 of about 2; drover status shows how far it is\n", out
    )
    assert (code, err) == (0, "")


def test_an_aborted_one_says_why_and_fails(
    drover: Callable[..., Said], controller: SmallController, meanwhile: list[Callable[[], None]]
) -> None:
    meanwhile += [lambda: controller.end(replace(RUNS, phase="aborted", reason="shard-2 cannot read layer 3"))]
    assert drover(*RESIZE) == (
        1, "", "drover: error: resize-1 was aborted: shard-2 cannot read layer 3\n"
    )  # fmt: skip


def test_ctrl_c_leaves_it_going_on_and_says_how_to_end_it(
    drover: Callable[..., Said], controller: SmallController, meanwhile: list[Callable[[], None]]
) -> None:
    meanwhile += [lambda: signal.raise_signal(signal.SIGINT)]
    code, out, err = drover(*RESIZE)
    assert (code, out) == (130, "")
    assert err == "\nresize-1 goes on; drover status --watch shows it, drover abort resize-1 ends it\n"
    assert controller.running is not None


@pytest.mark.parametrize(
    ("command", "refusal"),
    [
        (RESIZE, "3 shards hold 3 * 40 experts per layer, the model has 128; ask for 4 or more"),
        (("drain", "shard-1"), "shard-1 is the only shard that serves experts 0-63 of layer 1"),
        (("undrain", "shard-1"), "shard-1 is not drained"),
        (("drain", "--undo", "shard-1"), "shard-1 is not drained"),
    ],
)
def test_a_refusal_is_one_line(
    command: tuple[str, ...], refusal: str, drover: Callable[..., Said], controller: SmallController
) -> None:
    controller.refusal = refusal
    assert drover(*command) == (1, "", f"drover: error: {refusal}\n")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("resize",), "nothing to change: give --shards, --routers, --replicas or --frontends"),
        (("resize", "--shards", "0"), "argument --shards: '0' is no whole number from 1 to 4096"),
        (("resize", "--shards", "2", "--operation-id", "a b"), "argument --operation-id: 'a b' must have from 1 to 64"),
        (("undrain", "a/b"), "argument TARGET: 'a/b' is neither a part's name nor a node's"),
        (("autoscale", "stop"), "argument what: invalid choice: 'stop'"),
        (("events", "--last", "0"), "argument --last: '0' is no whole number from 1 to 256"),
    ],
)
def test_wrong_usage_is_one_line(
    command: tuple[str, ...], message: str, drover: Callable[..., Said], controller: SmallController
) -> None:
    code, out, err = drover(*command)
    assert (code, out) == (2, "")
    assert err.startswith(f"drover {command[0]}: error: {message}")
    assert err.count("\n") == 1
    assert controller.asked == []


WORTH_IT = RebalanceReport(
    "", "", 1.84, 1.07, 48 * 2**20, 12.5, True, "12.5 tokens/s for 600 s are worth 48 MiB", ("expert 3 of layer 1 ...",)
)
NUMBERS = "imbalance 1.840 -> 1.070, 48.0 MiB to move, worth 12.5 tokens/s: "


def test_a_dry_run_of_rebalancing_changes_nothing(drover: Callable[..., Said], controller: SmallController) -> None:
    controller.report = WORTH_IT
    code, out, _ = drover("rebalance", "--dry-run")
    assert out == f"{NUMBERS}would be done\n{WORTH_IT.reason}\n  expert 3 of layer 1 ...\n"
    assert (code, controller.running) == (0, None)
    code, out, _ = drover("rebalance", "--dry-run", "--json")
    assert (code, json.loads(out)["imbalance_after"]) == (0, 1.07)


def test_rebalancing_is_done_only_if_it_is_worth_it(
    drover: Callable[..., Said], controller: SmallController, meanwhile: list[Callable[[], None]]
) -> None:
    controller.report = replace(WORTH_IT, is_accepted=False)
    assert drover("rebalance")[1].startswith(f"{NUMBERS}is not worth it\n")
    controller.report = WORTH_IT
    meanwhile += [lambda: controller.end(OperationStatus("now", "rebalance", "done", moved_bytes=2**20))]
    code, out, _ = drover("rebalance", "--operation-id", "now")
    assert code == 0
    assert out.startswith(f"{NUMBERS}is done\n")
    assert re.search(r"\nnow: done after \d+\.\d s, 1\.0 MiB moved\n$", out)


def test_an_operation_is_aborted_by_its_name(drover: Callable[..., Said], controller: SmallController) -> None:
    assert drover("abort", "resize-1") == (1, "", "drover: error: resize-1 does not run\n")
    controller.running = RUNS
    assert drover("abort", "resize-1") == (0, "resize-1 ends\n", "")


def test_autoscaling_is_paused_and_resumed(drover: Callable[..., Said], controller: SmallController) -> None:
    assert drover("autoscale", "pause")[1] == "autoscaling is paused\n"
    assert drover("autoscale", "resume")[1] == "autoscaling goes on\n"
    assert controller.asked == [("pause_autoscaling", True), ("pause_autoscaling", False)]


def test_decisions_are_lines_of_json(drover: Callable[..., Said], controller: SmallController) -> None:
    code, out, _ = drover("autoscale", "log")
    assert (code, [json.loads(line)["kind"] for line in out.splitlines()]) == (0, ["copies", "shards"])


def test_undrain_is_drain_undone(drover: Callable[..., Said], controller: SmallController) -> None:
    assert drover("undrain", "shard-1") == drover("drain", "--undo", "shard-1")
    assert controller.asked == [("undo_drain", "shard-1")] * 2


@pytest.mark.parametrize(
    ("command", "outcome"),
    [
        (("drain", "shard-1"), {"target": "shard-1", "is_drained": True}),
        (("undrain", "shard-1"), {"target": "shard-1", "is_drained": False}),
        (("abort", "resize-1"), {"operation_id": "resize-1", "is_aborted": True}),
        (("autoscale", "pause"), {"is_paused": True}),
    ],
)
def test_outcomes_for_programs(
    command: tuple[str, ...], outcome: dict[str, object], drover: Callable[..., Said], controller: SmallController
) -> None:
    controller.running = RUNS
    code, out, _ = drover(*command, "--json")
    assert (code, json.loads(out)) == (0, outcome)


def test_events_are_lines_oldest_first(drover: Callable[..., Said], controller: SmallController) -> None:
    for number in range(40):
        controller.events.add("part", "shard-1", f"died {number}", restarts=number)
    code, out, _ = drover("events", "--last", "2")
    assert code == 0
    assert re.fullmatch(
        r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  part       shard-1: died 38\n)"
        r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  part       shard-1: died 39\n)",
        out,
    )
    told = [json.loads(line) for line in drover("events", "--json")[1].splitlines()]
    assert [event["data"]["restarts"] for event in told] == list(range(10, 40))


def test_followed_events_come_once_until_ctrl_c(
    drover: Callable[..., Said], controller: SmallController, meanwhile: list[Callable[[], None]]
) -> None:
    controller.events.add("part", "shard-1", "died")
    meanwhile += [
        lambda: controller.events.add("part", "shard-1", "is ready"),
        lambda: None,
        lambda: signal.raise_signal(signal.SIGINT),
    ]
    code, out, err = drover("events", "--follow")
    assert (code, err) == (0, "")
    assert [line.partition("shard-1: ")[2] for line in out.splitlines()] == ["died", "is ready"]


@pytest.mark.parametrize("command", [abort, autoscale, drain, events, rebalance, resize, undrain])
def test_help_teaches_by_example(command: Any, drover: Callable[..., Said]) -> None:
    name = command.__name__.rpartition(".")[2]
    code, out, _ = drover(name, "--help")
    assert code == 0
    assert f"  drover {name} " in out.partition("example")[2]
    assert max(map(len, out.splitlines())) <= 100

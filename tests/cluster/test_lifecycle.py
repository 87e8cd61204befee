"""`drover serve`, `status`, `stop` and `demo` as a user runs them, with a local Ray, of which nothing is left."""

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from client import Client, ServerUnavailable
from tests.cli.test_imports import MODEL
from tests.cluster import commands
from tests.cluster.commands import NAMESPACE, START_S, address_in, assert_ends_cleanly, write_deployment_file
from tests.command import ROOT, RUN_COMMAND, Screen, Watched, drover, drover_process, start, watched
from tests.processes import PATIENCE_S, processes_with, wait_until
from tests.reference import Reference, prompt


@pytest.fixture
def reference(reference_of: Callable[[str], Reference]) -> Reference:
    return reference_of("maverick")


@pytest.fixture
def deployment_file(reference: Reference, tmp_path: Path) -> Path:
    return write_deployment_file(tmp_path / "deployment.yaml", reference.directory)


@pytest.fixture
def marked_environment() -> Iterator[dict[str, str]]:
    with commands.marked_environment() as environment:
        yield environment


def test_serve_status_generate_stop(deployment_file: Path, marked_environment: dict[str, str]) -> None:
    with start("serve", str(deployment_file), env=marked_environment) as process:
        assert process.stdout is not None
        screen = Screen(process.stdout.fileno())
        screen.read_until(b"is served on", START_S)

        done = drover("generate", "Hello", "--max-tokens", "5", "--json", "--address", address_in(deployment_file))
        assert len(json.loads(done.stdout)["token_ids"]) == 5

        status = json.loads(drover_process("status", "--namespace", NAMESPACE, "--json").stdout)
        assert [shard["experts_held"] for shard in status["shards"]] == [128, 128]  # 64 experts in each of 2 layers
        assert [shard["phase"] for shard in status["shards"]] == ["ready", "ready"]
        assert status["routers"][0]["engine"]["generated_tokens"] == 5
        looked = watched(MODEL, RUN_COMMAND, "status", "--namespace", NAMESPACE)
        assert (looked.returncode, looked.loaded) == (0, [])
        table = looked.stdout
        assert "router-0" in table
        assert "prefix hits" in table
        assert "shard-1" in table

        again = drover_process("serve", str(deployment_file))
        assert again.returncode == 1
        assert "frontend.grpc_port" in again.stderr

        stopped = watched(MODEL, RUN_COMMAND, "stop", "--namespace", NAMESPACE)
        assert stopped == Watched(0, "stopped frontend, controller, router-0, shard-0, shard-1\n", "", [])
        assert process.wait(START_S) == 0
    nothing = drover_process("stop", "--namespace", NAMESPACE)
    assert (nothing.returncode, nothing.stdout) == (1, "")


@pytest.mark.slow
def test_a_termination_while_serving_stops_everything(
    deployment_file: Path, marked_environment: dict[str, str]
) -> None:
    """SIGTERM, for which Ray has a handler of its own. Ctrl-C while serving is in test_detached.py."""
    with start("serve", str(deployment_file), env=marked_environment) as process:
        assert_ends_cleanly(process, signal.SIGTERM)


@pytest.mark.parametrize(
    ("stage", "number"), [(b"starting Ray", signal.SIGTERM), (b"loading weights", signal.SIGINT)], ids=str
)
def test_a_signal_at_any_moment_of_a_start_leaves_nothing(
    stage: bytes, number: signal.Signals, deployment_file: Path, marked_environment: dict[str, str]
) -> None:
    """Ray's own handlers would dump a stack and abort."""
    with start("serve", str(deployment_file), env=marked_environment) as process:
        assert process.stderr is not None
        Screen(process.stderr.fileno()).read_until(stage, START_S)
        process.send_signal(number)
        assert process.wait(START_S) == 130
        assert b"Traceback" not in process.stderr.read()
        assert not processes_of(marked_environment)


def processes_of(environment: dict[str, str]) -> dict[int, str]:
    return processes_with(f"{commands.MARK}={environment[commands.MARK]}")


def named(environment: dict[str, str], name: str) -> list[int]:
    """Ids of what runs there whose command line has `name` in it."""
    return [pid for pid, command in processes_of(environment).items() if name in command]


@contextmanager
def served(environment: dict[str, str], deployment_file: Path) -> Iterator["subprocess.Popen[bytes]"]:
    with start("serve", str(deployment_file), env=environment) as process:
        assert process.stdout is not None
        Screen(process.stdout.fileno()).read_until(b"is served on", START_S)
        yield process


@pytest.fixture
def odd_environment(marked_environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """TMPDIR is longer than a socket's path may be, and there is no home."""
    folder = tmp_path / ("long" * 40)
    folder.mkdir()
    return marked_environment | {"TMPDIR": str(folder), "HOME": "/"}


def part_of_ray(environment: dict[str, str], part: str) -> int:
    [pid] = [pid for pid in processes_of(environment) if os.readlink(f"/proc/{pid}/exe").endswith(f"/{part}")]
    return pid


def assert_ended_by(part: str, process: "subprocess.Popen[bytes]") -> None:
    """`drover serve` ends, because a part of its Ray has died, and says so in one line."""
    assert process.stderr is not None
    assert process.wait(START_S) == 1
    last = process.stderr.read().decode().splitlines()[-1]
    assert re.fullmatch(rf"drover: error: Ray's .*{part}.* died; its logs: /.*", last)


@pytest.mark.slow
def test_a_dead_raylet_ends_serve_with_one_line(deployment_file: Path, odd_environment: dict[str, str]) -> None:
    with served(odd_environment, deployment_file) as process:
        os.kill(part_of_ray(odd_environment, "raylet"), signal.SIGKILL)
        assert_ended_by("raylet", process)


@pytest.mark.slow
def test_streams_go_on_without_rays_head_whose_death_ends_serve_with_one_line(
    deployment_file: Path, odd_environment: dict[str, str], reference: Reference
) -> None:
    """Tokens do not pass through it. Frozen, it delays nobody; killed, it takes the server along in the end."""
    tokens, many = list(prompt(9)), 400
    expected = reference.greedy(tokens, many)[0]
    with served(odd_environment, deployment_file) as process, Client(address_in(deployment_file)) as client:

        def token_ids(began: Callable[[], None] = lambda: None) -> list[int]:
            stream = client.generate(tokens, max_tokens=many, temperature=0, timeout_s=PATIENCE_S)
            made = list(next(stream).token_ids)
            began()
            return made + [token_id for delta in stream for token_id in delta.token_ids]

        head = part_of_ray(odd_environment, "gcs_server")
        try:
            assert token_ids(lambda: os.kill(head, signal.SIGSTOP)) == expected
            assert client.health(timeout_s=PATIENCE_S) == "SERVING"
            assert token_ids() == expected  # a request that begins without the head
        finally:
            os.kill(head, signal.SIGCONT)
        with suppress(ServerUnavailable):  # any other end is a failure, a deadline above all
            assert token_ids(lambda: os.kill(head, signal.SIGKILL)) == expected
        assert_ended_by("gcs_server", process)


def test_a_killed_serve_leaves_nothing(deployment_file: Path, marked_environment: dict[str, str]) -> None:
    """The command alone is killed: the process that it had started notices, and ends all that it had started."""
    with served(marked_environment, deployment_file) as process:
        process.kill()
        wait_until(lambda: not processes_of(marked_environment), START_S)


def test_the_next_start_ends_a_haproxy_that_outlived_everything(
    deployment_file: Path, marked_environment: dict[str, str]
) -> None:
    with served(marked_environment, deployment_file):
        proxies = named(marked_environment, "haproxy -db")
        assert proxies
        everything = list(processes_of(marked_environment))
        for number in (signal.SIGSTOP, signal.SIGKILL):  # all at once: nobody is left to end anything
            for pid in set(everything) - set(proxies):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
    wait_until(lambda: set(processes_of(marked_environment)) <= set(proxies))
    assert processes_of(marked_environment)
    assert "shards.count is 129" in serve_fails(deployment_file, marked_environment, "shards.count=129")  # far enough
    wait_until(lambda: not processes_of(marked_environment))


def serve_fails(deployment_file: Path, environment: dict[str, str], *overrides: str) -> str:
    """Run `drover serve`, which must fail before Ray is up; returns its last line.

    For what goes wrong later, see test_failed_starts.py and test_detached.py.
    """
    flags = [flag for override in overrides for flag in ("--set", override)]
    failed = drover_process("serve", deployment_file, *flags, env=environment, timeout_s=START_S)
    assert failed.returncode == 1, failed.stderr
    assert "Traceback" not in failed.stderr
    _, _, message = failed.stderr.partition("drover: error: ")
    return message


def test_a_port_in_use(deployment_file: Path, marked_environment: dict[str, str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = serve_fails(deployment_file, marked_environment, f"frontend.grpc_port={port}")
    assert f"frontend.grpc_port is {port}, which cannot be opened" in message


def test_a_running_cluster_that_is_not_there(deployment_file: Path, marked_environment: dict[str, str]) -> None:
    message = serve_fails(deployment_file, marked_environment, "ray.address=127.0.0.1:1")
    assert "no Ray cluster answers at '127.0.0.1:1'" in message


def test_the_demo_chats_writes_and_leaves_nothing(marked_environment: dict[str, str]) -> None:
    """It serves deploy/local.yaml with its own two shards; only the ports and the namespace differ."""
    done = drover_process("demo", "--max-tokens", "40", env=marked_environment, timeout_s=START_S)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "stopped, nothing left running")
    glossary = dict(line.split("\t") for line in (ROOT / "demo" / "glossary.tsv").read_text().splitlines())
    known = [glossary[term] for term in ("photosynthesis", "expert parallelism", "capital of France")]
    assert "drover-demo is served on 127.0.0.1:" in done.stdout
    assert "by 1 router and 2 shards" in done.stdout
    _, chat, texts = re.split(r"A chat.*|Texts continued.*", done.stdout)
    answers = re.findall(r"^> .*\n(.+)", chat, flags=re.MULTILINE)
    assert answers == [*known, "That word is not in my glossary."]
    assert texts.count("> ") == 4
    assert re.search(r"decoding +[\d.]+ tokens/s", done.stdout)


def test_the_shipped_deployment_file_is_valid() -> None:
    from tests.cluster.commands import load_deployment

    assert load_deployment(ROOT / "deploy" / "local.yaml").shards.count == 2

"""`drover serve`, `status` and `stop` as a user runs them; starts that fail; and nothing left running after any."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from cluster.free_ports import free_ports
from tests.cluster.test_service import wait_until
from tests.command import ROOT, Screen, drover, start
from tests.reference import make_served_reference

START_S = 90.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    return make_served_reference(directory, "maverick").directory


@pytest.fixture
def deployment_file(checkpoint: Path, tmp_path: Path) -> Path:
    grpc_port, http_port = free_ports(2)
    path = tmp_path / "deployment.yaml"
    raw = {
        "checkpoint": str(checkpoint),
        "ray": {"namespace": "drover-lifecycle", "num_cpus": 2},
        "frontend": {"grpc_port": grpc_port, "http_port": http_port},
    }
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture
def marked_environment() -> Iterator[dict[str, str]]:
    """An environment by which every process that descends from a command is known; none may outlive the test."""
    mark = f"DROVER_TEST_MARK={uuid.uuid4().hex}"
    name, value = mark.split("=")
    yield os.environ | {name: value}
    wait_until(lambda: not processes_with(mark))


def processes_with(mark: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue  # gone, or a zombie
    return found


def address_in(deployment_file: Path) -> str:
    return f"127.0.0.1:{yaml.safe_load(deployment_file.read_text())['frontend']['grpc_port']}"


def test_serve_status_generate_stop(deployment_file: Path, marked_environment: dict[str, str]) -> None:
    with start("serve", str(deployment_file), env=marked_environment) as process:
        assert process.stdout is not None
        screen = Screen(process.stdout.fileno())
        screen.read_until(b"is served on", START_S)

        done = drover("generate", "Hello", "--max-tokens", "5", "--json", "--address", address_in(deployment_file))
        assert len(json.loads(done.stdout)["token_ids"]) == 5

        status = json.loads(drover("status", "--namespace", "drover-lifecycle", "--json").stdout)
        assert [shard["experts_held"] for shard in status["shards"]] == [128, 128]  # 64 experts in each of 2 layers
        assert [shard["phase"] for shard in status["shards"]] == ["ready", "ready"]
        assert status["routers"][0]["engine"]["generated_tokens"] == 5
        table = drover("status", "--namespace", "drover-lifecycle").stdout
        assert "router-0" in table
        assert "prefix hits" in table
        assert "shard-1" in table

        again = drover("serve", str(deployment_file))
        assert again.returncode == 1
        assert "frontend.grpc_port" in again.stderr

        stopped = drover("stop", "--namespace", "drover-lifecycle")
        assert stopped.stdout == "stopped frontend, router-0, shard-0, shard-1\n"
        assert process.wait(START_S) == 0
    nothing = drover("stop", "--namespace", "drover-lifecycle")
    assert (nothing.returncode, nothing.stdout) == (1, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_serving_stops_everything(
    deployment_file: Path, marked_environment: dict[str, str], number: signal.Signals
) -> None:
    with start("serve", str(deployment_file), env=marked_environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        screen = Screen(process.stdout.fileno())
        screen.read_until(b"Ctrl-C", START_S)
        process.send_signal(number)
        screen.read_until(b"stopped", START_S)
        assert process.wait(START_S) == 0
        assert b"Traceback" not in process.stderr.read()


def test_a_signal_while_starting_stops_everything(deployment_file: Path, marked_environment: dict[str, str]) -> None:
    with start("serve", str(deployment_file), env=marked_environment) as process:
        assert process.stderr is not None
        screen = Screen(process.stderr.fileno())
        screen.read_until(b"loading weights", START_S)
        process.send_signal(signal.SIGINT)
        assert process.wait(START_S) == 130
        assert b"Traceback" not in process.stderr.read()


def serve_fails(deployment_file: Path, environment: dict[str, str], *overrides: str) -> str:
    """Run `drover serve`, which must fail; returns its last line."""
    flags = [flag for override in overrides for flag in ("--set", override)]
    with start("serve", str(deployment_file), *flags, env=environment) as process:
        assert process.stderr is not None
        stderr = process.stderr.read().decode()
        assert process.wait(START_S) == 1, stderr
    assert "Traceback" not in stderr
    _, _, message = stderr.partition("drover: error: ")
    return message


def test_no_room_for_the_actors(deployment_file: Path, marked_environment: dict[str, str]) -> None:
    message = serve_fails(deployment_file, marked_environment, "shards.cpus=32")
    assert "no room for the actors: they need 65 CPUs" in message
    assert "the Ray cluster has 2" in message


def test_a_port_in_use(deployment_file: Path, marked_environment: dict[str, str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = serve_fails(deployment_file, marked_environment, f"frontend.grpc_port={port}")
    assert f"frontend.grpc_port is {port}, which cannot be opened" in message


def test_more_shards_than_experts(deployment_file: Path, marked_environment: dict[str, str]) -> None:
    message = serve_fails(deployment_file, marked_environment, "shards.count=129")
    assert "shards.count is 129; the model has 128 experts" in message


def test_a_shard_that_fails_to_load_is_named(
    deployment_file: Path, checkpoint: Path, tmp_path: Path, marked_environment: dict[str, str]
) -> None:
    """All looks right to the launcher, but the shards' processes find no GPU to put their weights on."""
    message = serve_fails(
        deployment_file, marked_environment, "shards.device=cuda", "shards.gpus=0.1", "ray.num_gpus=1"
    )
    assert "shard-" in message
    assert "failed to start" in message


def remove(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).unlink()


def truncate_weights(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1000)


def make_weights_integers(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'"F32"', b'"I32"'))


def double_the_configured_width(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a missing weights file": (remove("model.safetensors"), "model.safetensors"),
    "a truncated weights file": (truncate_weights, "truncated"),
    "a wrong dtype": (make_weights_integers, "I32"),
    "impossible shapes": (double_the_configured_width, "has shape [400, 32]; the config calls for [400, 64]"),
    "a missing tokenizer": (remove("tokenizer.json"), "tokenizer.json"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_not_served(
    name: str, deployment_file: Path, checkpoint: Path, tmp_path: Path, marked_environment: dict[str, str]
) -> None:
    damage, message = DAMAGES[name]
    copy = shutil.copytree(checkpoint, tmp_path / "damaged")
    damage(copy)
    assert message in serve_fails(deployment_file, marked_environment, f"checkpoint={copy}")


def test_a_running_cluster_that_is_not_there(deployment_file: Path, marked_environment: dict[str, str]) -> None:
    message = serve_fails(deployment_file, marked_environment, "ray.address=127.0.0.1:1")
    assert "no Ray cluster answers at '127.0.0.1:1'" in message


@dataclass(frozen=True)
class RunningRay:
    """A Ray cluster of one node: its address, and the environment that its token is in."""

    address: str
    environment: dict[str, str]


@pytest.fixture
def ray_cluster(marked_environment: dict[str, str]) -> Iterator[RunningRay]:
    """As `ray start` makes it, in a folder of its own: "auto" on this machine must not come to mean a test's Ray."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex, "RAY_SERVE_ENABLE_HA_PROXY": "1"}
    environment = marked_environment | token
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        port = free_ports(1)[0]
        where = [f"--port={port}", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}", "--num-cpus=2"]
        options = ["--include-dashboard=false", "--disable-usage-stats", "--block"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", *where, *options]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            assert process.stdout is not None
            Screen(process.stdout.fileno()).read_until(b"--block", START_S)
            try:
                yield RunningRay(f"127.0.0.1:{port}", environment)
            finally:
                process.terminate()
                process.wait(START_S)


def test_a_detached_deployment_on_a_running_cluster(deployment_file: Path, ray_cluster: RunningRay) -> None:
    environment, address = ray_cluster.environment, ray_cluster.address
    on_cluster = ("--set", f"ray.address={address}")
    served = drover("serve", str(deployment_file), *on_cluster, "--detach", env=environment, timeout_s=START_S)
    assert "is served on" in served.stdout, served.stderr
    again = drover("serve", str(deployment_file), *on_cluster, *other_ports(), env=environment)
    assert "already run in namespace 'drover-lifecycle'; `drover stop" in again.stderr

    other = drover("stop", "--ray-address", address, "--namespace", "somebody-elses", env=environment)
    assert (other.returncode, other.stdout) == (1, "")
    done = drover("generate", "Hello", "--max-tokens", "5", "--json", "--address", address_in(deployment_file))
    assert len(json.loads(done.stdout)["token_ids"]) == 5

    flags = ("--ray-address", address, "--namespace", "drover-lifecycle")
    stopped = drover("stop", *flags, env=environment, timeout_s=START_S)
    assert stopped.stdout == "stopped frontend, router-0, shard-0, shard-1\n"


@pytest.mark.parametrize("command", ["status", "stop"])
def test_a_ray_that_is_gone_is_no_reason_to_wait(command: str) -> None:
    gone = os.environ | {"RAY_ADDRESS": "127.0.0.1:1"}
    done = drover(command, "--namespace", "nobodys", env=gone)
    assert done.returncode == 1
    assert "nothing runs in namespace 'nobodys'" in done.stderr


def other_ports() -> tuple[str, ...]:
    grpc_port, http_port = free_ports(2)
    return ("--set", f"frontend.grpc_port={grpc_port}", "--set", f"frontend.http_port={http_port}")


def test_the_demo_chats_writes_and_leaves_nothing(marked_environment: dict[str, str]) -> None:
    done = drover("demo", "--max-tokens", "40", env=marked_environment, timeout_s=START_S)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "stopped, nothing left running")
    glossary = dict(line.split("\t") for line in (ROOT / "demo" / "glossary.tsv").read_text().splitlines())
    known = [glossary[term] for term in ("photosynthesis", "expert parallelism", "capital of France")]
    _, chat, texts = re.split(r"A chat.*|Texts continued.*", done.stdout)
    answers = re.findall(r"^> .*\n(.+)", chat, flags=re.MULTILINE)
    assert answers == [*known, "That word is not in my glossary."]
    assert texts.count("> ") == 4
    assert re.search(r"decoding +[\d.]+ tokens/s", done.stdout)


def test_the_shipped_deployment_file_is_valid() -> None:
    from cluster.config import load_deployment

    assert load_deployment(ROOT / "deploy" / "local.yaml").shards.count == 2

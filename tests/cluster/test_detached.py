"""Deployments on a Ray cluster that somebody else has started, and that goes on without them."""

import json
import re
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from client import Client, ServerUnavailable
from cluster import ray_runtime
from cluster.free_ports import free_ports
from tests.cluster.commands import (
    NAMESPACE,
    START_S,
    address_in,
    marked_environment,
    other_ports,
    write_deployment_file,
)
from tests.command import Screen, drover, drover_process, start
from tests.processes import PATIENCE_S, wait_until
from tests.reference import Reference, prompt

ONE_SHARD = ("--set", "shards.count=1")
ALL_PARTS = "frontend, controller, router-0, shard-0"


@dataclass(frozen=True)
class RunningRay:
    """A Ray cluster of one node: the options that name it, and the environment that its token is in."""

    address: str
    environment: dict[str, str]


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[RunningRay]:
    """As `ray start` makes it, in a folder of its own: "auto" on this machine must not come to mean a test's Ray."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex, "RAY_SERVE_ENABLE_HA_PROXY": "1"}
    with (
        marked_environment() as marked,
        tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder,
    ):
        environment = marked | token | ray_runtime._serve_ports()  # not those of this process's own Ray
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


@pytest.fixture(scope="module")
def reference(reference_of: Callable[[str], Reference]) -> Reference:
    return reference_of("maverick")


@pytest.fixture
def deployment_file(reference: Reference, tmp_path: Path) -> Path:
    return write_deployment_file(tmp_path / "deployment.yaml", reference.directory)


def nothing_runs(ray_cluster: RunningRay) -> bool:
    """Ask the cluster, which still answers."""
    flags = ("--ray-address", ray_cluster.address, "--namespace", NAMESPACE)
    stopped = drover_process("stop", *flags, env=ray_cluster.environment)
    return (stopped.returncode, stopped.stderr) == (1, f"nothing runs in namespace {NAMESPACE!r}\n")


def test_no_room_for_the_actors(deployment_file: Path, ray_cluster: RunningRay) -> None:
    overrides = ("--set", f"ray.address={ray_cluster.address}", "--set", "shards.cpus=32")
    failed = drover_process("serve", deployment_file, *overrides, env=ray_cluster.environment, timeout_s=START_S)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "Traceback" not in failed.stderr
    _, _, message = failed.stderr.partition("drover: error: ")
    assert "no room for the actors: they need 65 CPUs" in message
    assert "the Ray cluster has 2" in message
    assert nothing_runs(ray_cluster)


def test_a_detached_deployment_on_a_running_cluster(
    deployment_file: Path, ray_cluster: RunningRay, reference: Reference
) -> None:
    environment, address = ray_cluster.environment, ray_cluster.address
    serve = ("serve", deployment_file, "--set", f"ray.address={address}", *ONE_SHARD)
    served = drover_process(*serve, "--detach", env=environment, timeout_s=START_S)
    assert "is served on" in served.stdout, served.stderr
    again = drover_process(*serve, *other_ports(), env=environment)
    assert f"already run in namespace {NAMESPACE!r}; `drover stop" in again.stderr

    other = drover_process("stop", "--ray-address", address, "--namespace", "somebody-elses", env=environment)
    assert (other.returncode, other.stdout) == (1, "")
    for length in (1, 17, 75):
        tokens, logits = reference.greedy(list(prompt(length)), 64)
        flags = ("--max-tokens", "64", "--temperature", "0", "--logprobs", "1", "--json")
        token_ids = ",".join(map(str, prompt(length)))
        done = drover("generate", "--token-ids", token_ids, *flags, "--address", address_in(deployment_file))
        answer = json.loads(done.stdout)
        assert answer["token_ids"] == tokens
        logprobs = logits.log_softmax(dim=-1).max(dim=-1).values.tolist()
        assert [entry["logprob"] for entry in answer["logprobs"]] == pytest.approx(logprobs, abs=1e-4)

    flags = ("--ray-address", address, "--namespace", NAMESPACE)
    stopped = drover_process("stop", *flags, env=environment, timeout_s=START_S)
    assert stopped.stdout == f"stopped {ALL_PARTS}\n"


def test_ctrl_c_lets_streams_finish_and_removes_the_deployment_alone(
    deployment_file: Path, ray_cluster: RunningRay, reference: Reference
) -> None:
    environment, address = ray_cluster.environment, ray_cluster.address
    on_cluster = ("--set", f"ray.address={address}", *ONE_SHARD)
    tokens, many = list(prompt(9)), 480
    with (
        start("serve", str(deployment_file), *on_cluster, env=environment) as process,
        Client(address_in(deployment_file)) as client,
    ):
        assert process.stdout is not None
        assert process.stderr is not None
        screen = Screen(process.stdout.fileno())
        screen.read_until(b"Ctrl-C", START_S)
        streams = [client.generate(tokens, max_tokens=many, temperature=0, timeout_s=PATIENCE_S) for _ in range(4)]
        token_ids = [list(next(stream).token_ids) for stream in streams]
        process.send_signal(signal.SIGINT)
        wait_until(lambda: is_refused(client))
        for ids, stream in zip(token_ids, streams, strict=True):
            ids += [token_id for delta in stream for token_id in delta.token_ids]
        assert token_ids == [reference.greedy(tokens, many)[0]] * 4
        screen.read_until(b"stopped", START_S)
        assert process.wait(START_S) == 0
        messages = process.stderr.read().decode()
        assert re.search("router-0 finishes [0-9] requests, within 30 s; the same signal again ends them", messages)
        assert "Traceback" not in messages
    assert nothing_runs(ray_cluster)


def is_refused(client: Client) -> bool:
    """Whether a new request hears that the server is stopping."""
    try:
        list(client.generate("Hello", max_tokens=1, timeout_s=PATIENCE_S))
    except ServerUnavailable as error:
        return "the server is stopping" in str(error)
    return False

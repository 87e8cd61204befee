"""`drover generate` and `drover chat` where no server is: the model is then in their own process."""

import json
import os
import pty
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import client
from cli import connect
from router import kv_budget
from tests.command import ROOT, Screen, drover, drover_process, start
from tests.fake_router import FakeRouter
from tests.local_model import greedy, load_model
from tests.processes import PATIENCE_S
from tests.reference import make_served_reference, prompt

ENDLESS = 100_000  # tokens, which take far longer than any test
ENDLESSLY = ("--max-tokens", str(ENDLESS), "--seed", "1")
AWAITED = b"e"  # a random text has it soon


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that never ends a text by itself."""
    directory = tmp_path_factory.mktemp("tiny") / "scout"
    return make_served_reference(directory, "scout", max_position_embeddings=2 * ENDLESS).directory


SetDefaults = Callable[..., None]


@pytest.fixture
def set_defaults(monkeypatch: pytest.MonkeyPatch) -> SetDefaults:
    """Sets the address and the embedded model that every `drover` of this test falls back to."""

    def set_them(address: str, embedded: Path = connect.EMBEDDED) -> None:
        monkeypatch.setattr(connect, "DEFAULT_ADDRESS", address)
        monkeypatch.setattr(connect, "EMBEDDED", embedded)

    return set_them


@pytest.fixture
def silent_address() -> Iterator[str]:
    """Nobody listens there, nor can anybody before the test ends: this process holds the port."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{holder.getsockname()[1]}"


def notice(address: str) -> str:
    return (
        f"no server on {address}; the embedded demo model answers from this process "
        "(--address names a server, --checkpoint another model)\n"
    )


def test_the_defaults_are_the_documented_ones() -> None:
    assert connect.DEFAULT_ADDRESS == client.DEFAULT_ADDRESS == "127.0.0.1:9000"
    assert connect.EMBEDDED == ROOT / "demo" / "drover-demo"


def test_a_checkpoint_gives_the_models_own_tokens(checkpoint: Path) -> None:
    expected, _ = greedy(load_model(checkpoint), list(prompt(20)), 24)
    token_ids = ",".join(map(str, prompt(20)))
    flags = ("--max-tokens", "24", "--temperature", "0", "--json", "--model", "scout")
    done = drover_process("generate", "--checkpoint", checkpoint, "--token-ids", token_ids, *flags)
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    assert (answer["token_ids"], answer["finish_reason"]) == (expected, "length")


def test_a_checkpoint_that_leaves_no_room_for_the_kv_cache_is_refused_without_a_trace(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_budget, "DEFAULT_KV_BYTES", 2**50)
    done = drover("generate", "Hi", "--checkpoint", str(checkpoint))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("drover: error: the default of engine.kv_bytes asks for 1048576.00 GiB of KV cache")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("more", [(), ("--json", "--model", "drover-demo")], ids=["text", "json"])
def test_the_embedded_model_answers_where_no_server_is(
    silent_address: str, set_defaults: SetDefaults, more: tuple[str, ...]
) -> None:
    set_defaults(silent_address)
    done = drover("generate", "Once upon a time", "--max-tokens", "5", *more)
    assert (done.returncode, done.stderr) == (0, notice(silent_address))
    if more:
        assert 1 <= json.loads(done.stdout)["usage"]["completion_tokens"] <= 5


def test_the_embedded_model_chats_over_a_pipe(silent_address: str, set_defaults: SetDefaults) -> None:
    set_defaults(silent_address)
    done = drover("chat", "--max-tokens", "5", "--json", stdin="Hello!\nAnd now?\n")
    assert (done.returncode, done.stderr) == (0, notice(silent_address))
    assert len([json.loads(line) for line in done.stdout.splitlines()]) == 2


def test_a_chat_with_a_checkpoint_remembers(checkpoint: Path) -> None:
    done = drover("chat", "--checkpoint", str(checkpoint), "--max-tokens", "20", "--json", stdin="one\ntwo\n")
    assert (done.returncode, done.stderr) == (0, "")
    first, second = (json.loads(line)["usage"] for line in done.stdout.splitlines())
    assert second["prompt_tokens"] > 2 * first["prompt_tokens"]


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_a_server_on_the_default_address_answers(
    router: FakeRouter, address: str, set_defaults: SetDefaults, tmp_path: Path, name: str
) -> None:
    set_defaults(address, tmp_path / "nowhere")
    done = drover(name, stdin="Hi\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hello!\n", "")
    assert len(router.requests) == 1


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_a_named_server_is_never_replaced(silent_address: str, set_defaults: SetDefaults, name: str) -> None:
    set_defaults(silent_address)
    done = drover(name, "--address", silent_address, stdin="Hi\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"drover: error: no server answers at {silent_address} ")
    assert done.stderr.count("\n") == 1


def test_no_server_and_no_embedded_model_is_said_in_one_line(
    silent_address: str, set_defaults: SetDefaults, tmp_path: Path
) -> None:
    embedded = tmp_path / "nowhere"
    set_defaults(silent_address, embedded)
    done = drover("generate", "Hi")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"drover: error: no server on {silent_address}, and the embedded demo model is missing ({embedded}); "
        "start one with `drover serve`, or name a server with --address or a model with --checkpoint\n"
    )


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_a_directory_that_is_missing_is_said_in_one_line(tmp_path: Path, name: str) -> None:
    done = drover(name, "--checkpoint", str(tmp_path / "nowhere"), stdin="Hi\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"drover: error: {tmp_path}/nowhere/config.json is missing; a checkpoint is a Hugging Face Llama 4 directory\n"
    )


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_a_server_and_a_checkpoint_exclude_each_other(checkpoint: Path, name: str) -> None:
    done = drover(name, "--address", "127.0.0.1:1", "--checkpoint", str(checkpoint), stdin="Hi\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert "argument --checkpoint: not allowed with argument --address" in done.stderr


def test_ctrl_c_during_an_answer_ends_everything(checkpoint: Path) -> None:
    arguments = ("generate", "Hi", "--checkpoint", str(checkpoint), *ENDLESSLY)
    with start(*arguments, start_new_session=True) as process:
        Screen(process.stdout.fileno()).read_until(AWAITED)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 130
        assert process.stderr.read() == b""
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)


def test_ctrl_c_stops_an_answer_but_not_the_chat(checkpoint: Path) -> None:
    with start("chat", "--checkpoint", str(checkpoint), *ENDLESSLY) as process:
        answers, remarks = Screen(process.stdout.fileno()), Screen(process.stderr.fileno())
        for message in (b"one\n", b"two\n"):
            process.stdin.write(message)
            answers.read_until(AWAITED)
            process.send_signal(signal.SIGINT)
            remarks.read_until(b"[stopped]\n")
        process.stdin.close()
        assert process.wait(PATIENCE_S) == 0
        assert process.stderr.read() == b""


def test_loading_shows_on_a_terminal_and_ctrl_c_ends_it(checkpoint: Path) -> None:
    leader, follower = pty.openpty()
    screen = Screen(leader)
    with start("generate", "Hi", "--checkpoint", str(checkpoint), *ENDLESSLY, stderr=follower) as process:
        screen.read_until(b"loading scout")
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 130
        os.write(follower, b"the end")
        rest = screen.read_until(b"the end")
    assert b"Traceback" not in rest
    assert b"\x1b[?25h" in rest  # the cursor is back
    os.close(follower)
    os.close(leader)


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_help_says_who_answers(name: str) -> None:
    done = drover(name, "--help")
    assert f"drover {name}" in done.stdout
    assert connect.WHO_ANSWERS in done.stdout
    assert "--checkpoint DIR" in done.stdout

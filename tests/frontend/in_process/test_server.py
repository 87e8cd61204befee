"""A checkpoint served from a thread of this process, from the weights to gRPC."""

import json
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from checkpoint.errors import CheckpointError
from client import Client, ClientError, ServerUnavailable
from frontend.in_process import server
from frontend.in_process.server import serve_checkpoint
from router import local
from router.kv_budget import KvBudget, NoRoom
from tests.local_model import greedy, load_model
from tests.processes import PATIENCE_S
from tests.reference import VOCAB_SIZE, make_served_reference, prompt

ENDLESS = 100_000  # tokens, which take far longer than any test


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that never ends a text by itself."""
    directory = tmp_path_factory.mktemp("tiny") / "scout"
    return make_served_reference(directory, "scout", max_position_embeddings=2 * ENDLESS).directory


@pytest.fixture(autouse=True)
def _every_thread_ends() -> Any:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("engine", "serving"))]


def test_the_tokens_are_the_models_own(directory: Path) -> None:
    expected, _ = greedy(load_model(directory), list(prompt(20)), 24)
    with serve_checkpoint(directory, threads=1) as address, Client(address) as client:
        stream = client.generate(prompt(20), max_tokens=24, temperature=0, timeout_s=PATIENCE_S)
        tokens = [token_id for delta in stream for token_id in delta.token_ids]
    assert tokens == expected


def test_it_chats(directory: Path) -> None:
    with serve_checkpoint(directory) as address, Client(address) as client:
        *_, last = client.chat([("user", "Hi")], max_tokens=3, timeout_s=PATIENCE_S)
    assert last.usage is not None
    assert last.usage.completion_tokens == 3


def test_the_card_is_the_checkpoints(directory: Path) -> None:
    with serve_checkpoint(directory) as address, Client(address) as client:
        info = client.model_info(timeout_s=PATIENCE_S)
        assert client.health(timeout_s=PATIENCE_S) == "SERVING"
    assert (info.model, info.dtype, info.num_experts, info.vocab_size) == ("scout", "float32", 16, VOCAB_SIZE)
    assert (info.max_context_tokens, info.has_chat_template) == (2 * ENDLESS, True)


def test_the_dtype_is_the_checkpoints(directory: Path, tmp_path: Path) -> None:
    for file in directory.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((directory / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    with serve_checkpoint(tmp_path) as address, Client(address) as client:
        assert client.model_info(timeout_s=PATIENCE_S).dtype == "bfloat16"


def test_a_request_that_leaves_it_out_is_sampled_as_the_checkpoint_proposes(directory: Path, tmp_path: Path) -> None:
    for file in directory.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0}))
    with serve_checkpoint(tmp_path) as address, Client(address) as client:

        def tokens(**sampling: Any) -> list[int]:
            stream = client.generate(prompt(9), max_tokens=16, seed=1, timeout_s=PATIENCE_S, **sampling)
            return [token_id for delta in stream for token_id in delta.token_ids]

        assert tokens() == tokens(temperature=0)
        assert tokens() != tokens(temperature=1)


def test_leaving_ends_an_answer_and_the_server(directory: Path) -> None:
    with ExitStack() as stack:
        with serve_checkpoint(directory) as address:
            client = stack.enter_context(Client(address))
            stream = client.generate(prompt(5), max_tokens=ENDLESS, timeout_s=PATIENCE_S, resume_s=0)
            next(stream)
        with pytest.raises(ClientError) as ended:
            list(stream)
        assert ended.value.code in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
        with pytest.raises(ServerUnavailable, match="no server answers"):
            client.model_info(timeout_s=PATIENCE_S)


def test_an_error_in_the_block_passes_through(directory: Path) -> None:
    with pytest.raises(KeyboardInterrupt), serve_checkpoint(directory):
        raise KeyboardInterrupt


def test_an_interrupt_while_the_weights_are_read_ends_the_reading(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = threading.Event()

    def read_slowly(*arguments: Any) -> None:
        on_bytes, deadline = arguments[-1], time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            reading.set()
            on_bytes(1)
        raise AssertionError("the reading went on")

    def interrupted(*_: Any, **__: Any) -> None:
        assert reading.wait(PATIENCE_S)
        raise KeyboardInterrupt

    monkeypatch.setattr(local, "load_shard", read_slowly)
    monkeypatch.setattr(server, "wait", interrupted)
    began_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt), serve_checkpoint(directory):
        raise AssertionError("it served")
    assert time.monotonic() - began_s < PATIENCE_S


def test_a_checkpoint_that_leaves_no_room_for_the_kv_cache_is_refused_with_the_arithmetic(directory: Path) -> None:
    arithmetic = r"engine\.kv_bytes asks for 1048576\.00 GiB of KV cache, but .* are free beside .* of weights"
    budget = KvBudget(bytes=2**50)
    with pytest.raises(NoRoom, match=arithmetic), serve_checkpoint(directory, kv_budget=budget):
        raise AssertionError("it served")


def test_what_is_no_checkpoint_is_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no directory"), serve_checkpoint(tmp_path / "nowhere"):
        pass
    for file in directory.iterdir():
        if file.name != "tokenizer.json":
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file"), serve_checkpoint(tmp_path):
        pass

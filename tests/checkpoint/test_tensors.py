"""Tensors are read exactly, and no byte beyond the rows asked for; damage is found before anything is served."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from checkpoint.errors import CheckpointError
from checkpoint.random_model import write_random_checkpoint
from checkpoint.shape import SHAPES
from checkpoint.tensor_files import INDEX_FILE, SINGLE_FILE
from checkpoint.tensors import Checkpoint

TINY = replace(
    SHAPES["maverick"],
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=24,
    intermediate_size_mlp=40,
    num_local_experts=16,
)
GATE_UP = "model.layers.1.feed_forward.experts.gate_up_proj"
DOWN = "model.layers.1.feed_forward.experts.down_proj"
TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def make(directory: Path, dtype: str = "bfloat16", max_file_bytes: int = 10**9) -> Path:
    write_random_checkpoint(directory, TINY, dtype=dtype, std=0.3, max_file_bytes=max_file_bytes)
    return directory


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint in one bfloat16 file; tests only read it."""
    return make(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A whole checkpoint in one bfloat16 file, for a test to damage."""
    return make(tmp_path / "checkpoint")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A whole checkpoint in several files, for a test to damage."""
    return make(tmp_path / "checkpoint", max_file_bytes=30_000)


@pytest.mark.parametrize("max_file_bytes", [10**9, 30_000], ids=["one file", "several files"])
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_every_tensor_is_what_safetensors_reads(dtype: str, max_file_bytes: int, tmp_path: Path) -> None:
    directory = make(tmp_path / "checkpoint", dtype, max_file_bytes)
    files = sorted(directory.glob("*.safetensors"))
    assert (len(files) > 1) == (max_file_bytes < 10**9)
    checkpoint = Checkpoint.open(directory)
    theirs = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert checkpoint.entries.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(checkpoint.read(name, TORCH_DTYPES[dtype]), tensor), name


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (3, 7), (15, 16), (0, 16), (5, 5)])
def test_a_range_of_experts_is_what_safetensors_slices(start: int, stop: int, tiny: Path) -> None:
    ours = Checkpoint.open(tiny).read_rows(GATE_UP, start, stop, torch.bfloat16)
    with safe_open(tiny / SINGLE_FILE, framework="pt") as file:
        theirs = file.get_slice(GATE_UP)[start:stop]
    assert torch.equal(ours, theirs)


def test_values_are_converted_to_the_dtype_asked_for(tiny: Path) -> None:
    stored = load_file(tiny / SINGLE_FILE)[DOWN]
    ours = Checkpoint.open(tiny).read(DOWN, torch.float32)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, stored.float())


@pytest.mark.parametrize("experts", [1, 5, 16])
def test_reading_k_of_e_experts_costs_k_of_e_of_the_tensor(experts: int, tiny: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    assert checkpoint.bytes_read == 0
    checkpoint.read_rows(GATE_UP, 16 - experts, 16, torch.float32)
    assert checkpoint.bytes_read == checkpoint.entries[GATE_UP].nbytes * experts // 16


@pytest.mark.parametrize("experts", [1, 5, 16])
def test_the_operating_system_hands_over_no_other_bytes(
    experts: int, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny)
    entry = checkpoint.entries[GATE_UP]
    first, last = entry.offset + entry.nbytes * (16 - experts) // 16, entry.offset + entry.nbytes
    seen: set[int] = set()
    preadv = os.preadv

    def recording_preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        count = preadv(descriptor, buffers, offset)
        seen.update(range(offset, offset + count))
        return count

    monkeypatch.setattr(os, "preadv", recording_preadv)
    checkpoint.read_rows(GATE_UP, 16 - experts, 16, torch.bfloat16)
    assert seen == set(range(first, last))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel does not count this process's reads")
def test_the_kernel_counts_the_same_bytes(tiny: Path) -> None:
    checkpoint = Checkpoint.open(tiny)

    def counters() -> str:
        return Path("/proc/self/io").read_text()

    def rchar(text: str) -> int:
        return int(text.split("rchar:")[1].split()[0])

    before = counters()
    checkpoint.read_rows(GATE_UP, 4, 9, torch.bfloat16)
    after = counters()
    counted = rchar(after) - rchar(before) - len(before)  # reading the counters counts, too
    assert counted == checkpoint.entries[GATE_UP].nbytes * 5 // 16


def test_progress_is_reported_in_bytes(tiny: Path) -> None:
    pieces: list[int] = []
    checkpoint = Checkpoint.open(tiny)
    checkpoint.read_rows(DOWN, 0, 8, torch.bfloat16, pieces.append)
    assert sum(pieces) == checkpoint.entries[DOWN].nbytes // 2


def test_tensors_that_the_model_has_no_use_for_are_left_alone(damaged: Path) -> None:
    tensors = load_file(damaged / SINGLE_FILE) | {"vision_model.class_embedding": torch.ones(3, dtype=torch.int8)}
    save_file(tensors, damaged / SINGLE_FILE)
    assert "vision_model.class_embedding" in Checkpoint.open(damaged).entries


def refusal(directory: Path) -> str:
    """What opening a damaged checkpoint says."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    return str(caught.value)


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere") == f"checkpoint {tmp_path / 'nowhere'} is no directory"


def test_a_directory_without_weights(damaged: Path) -> None:
    (damaged / SINGLE_FILE).unlink()
    assert f"has neither {SINGLE_FILE} nor {INDEX_FILE}" in refusal(damaged)


def test_a_truncated_file(damaged: Path) -> None:
    size = (damaged / SINGLE_FILE).stat().st_size
    os.truncate(damaged / SINGLE_FILE, size - 1)
    assert f"is truncated: model.layers.1.feed_forward.shared_expert.down_proj.weight ends at byte {size}" in refusal(
        damaged
    )


def test_a_file_that_shrinks_after_it_was_opened(damaged: Path) -> None:
    checkpoint = Checkpoint.open(damaged)
    os.truncate(damaged / SINGLE_FILE, checkpoint.entries[GATE_UP].offset + 100)
    with pytest.raises(CheckpointError, match=rf"ends inside {GATE_UP}; the file is truncated"):
        checkpoint.read(GATE_UP, torch.bfloat16)


def test_a_file_that_vanishes_after_it_was_opened(damaged: Path) -> None:
    checkpoint = Checkpoint.open(damaged)
    (damaged / SINGLE_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: "):
        checkpoint.read(GATE_UP, torch.bfloat16)


def test_missing_files_are_all_named_instead_of_their_tensors(sharded: Path) -> None:
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    first.unlink()
    second.unlink()
    lines = refusal(sharded).splitlines()[1:]
    assert [line.strip().split(" (")[0] for line in lines] == [f"{first} is missing", f"{second} is missing"]


def test_a_tensor_that_the_index_names_but_its_file_lacks(sharded: Path) -> None:
    path = sharded / json.loads((sharded / INDEX_FILE).read_text())["weight_map"][DOWN]
    tensors = load_file(path)
    del tensors[DOWN]
    save_file(tensors | {"another": torch.zeros(1)}, path)
    assert f"{DOWN} is missing" in refusal(sharded)


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn], ids=["I8", "F8_E4M3"])
def test_a_number_format_that_is_not_supported(
    stored: torch.dtype, damaged: Path, request: pytest.FixtureRequest
) -> None:
    tensors = load_file(damaged / SINGLE_FILE)
    save_file(tensors | {DOWN: tensors[DOWN].to(stored)}, damaged / SINGLE_FILE)
    assert f"{DOWN} has dtype {request.node.callspec.id}; supported are BF16, F16, F32" in refusal(damaged)


def test_a_tensor_of_another_shape(damaged: Path) -> None:
    tensors = load_file(damaged / SINGLE_FILE)
    save_file(tensors | {DOWN: tensors[DOWN].transpose(1, 2).contiguous()}, damaged / SINGLE_FILE)
    assert f"{DOWN} has shape [16, 32, 24]; the config calls for [16, 24, 32]" in refusal(damaged)


def test_many_problems_are_cut_off_and_counted(damaged: Path) -> None:
    save_file({"another": torch.zeros(1)}, damaged / SINGLE_FILE)
    message = refusal(damaged)
    assert len(message.splitlines()) == 1 + 10 + 1
    assert message.endswith("... and 14 more")


GARBAGE = {
    "empty": (b"", "is no safetensors file, or is truncated (0 bytes)"),
    "header longer than the file": (b"\xff" * 64, "is no safetensors file, or is truncated (64 bytes)"),
    "no JSON": ((8).to_bytes(8, "little") + b"{garbage", "has an unreadable header"),
    "no object": ((2).to_bytes(8, "little") + b"[]", "has an unreadable header: holds no JSON object"),
    "endless nesting": ((50_000).to_bytes(8, "little") + b"[" * 50_000, "has an unreadable header"),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_a_file_that_is_garbage(name: str, damaged: Path) -> None:
    content, message = GARBAGE[name]
    (damaged / SINGLE_FILE).write_bytes(content)
    assert f"{damaged / SINGLE_FILE} {message}" in refusal(damaged)


BAD_ENTRIES: dict[str, tuple[Any, str]] = {
    "no object": (7, "the header entry of x is damaged: 7"),
    "no shape": ({"dtype": "F32", "data_offsets": [0, 4]}, "the header entry of x is damaged"),
    "shape of text": ({"dtype": "F32", "shape": "ab", "data_offsets": [0, 4]}, "the header entry of x is damaged"),
    "negative shape": ({"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}, "the header entry of x is damaged"),
    "three offsets": ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}, "the header entry of x is damaged"),
    "offsets backwards": ({"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}, "the header entry of x is damaged"),
    "offset before data": ({"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}, "the header entry of x is damaged"),
    "impossible shape": ({"dtype": "F32", "shape": [9, 9], "data_offsets": [0, 4]}, "4 bytes, which does not fit F32"),
    "beyond the end": ({"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}, "is truncated: x ends"),
}


@pytest.mark.parametrize("name", BAD_ENTRIES)
def test_a_header_entry_that_cannot_be(name: str, damaged: Path) -> None:
    entry, message = BAD_ENTRIES[name]
    header = json.dumps({"x": entry}).encode()
    (damaged / SINGLE_FILE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert message in refusal(damaged)


@pytest.mark.parametrize("target", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", 7, ["x"]])
def test_an_index_that_leaves_the_directory(target: object, sharded: Path) -> None:
    (sharded / INDEX_FILE).write_text(json.dumps({"weight_map": {DOWN: target}}))
    assert f"weight_map puts {DOWN!r} into {target!r}; a file of the same directory is expected" in refusal(sharded)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_without_files(content: str, sharded: Path) -> None:
    (sharded / INDEX_FILE).write_text(content)
    assert "weight_map must be an object that names each tensor's file" in refusal(sharded)


def test_files_that_are_links_are_followed(sharded: Path, tmp_path: Path) -> None:
    """The Hugging Face cache keeps files elsewhere, and links in the checkpoint's directory."""
    elsewhere = tmp_path / "blobs"
    elsewhere.mkdir()
    for path in sharded.glob("*.safetensors"):
        path.rename(elsewhere / path.name)
        path.symlink_to(elsewhere / path.name)
    assert Checkpoint.open(sharded).read(DOWN, torch.float32).isfinite().all()

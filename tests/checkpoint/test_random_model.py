"""Random checkpoints are whole, reproducible, loadable by transformers, and never half there."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoint.config import RopeScaling
from checkpoint.errors import CheckpointError
from checkpoint.layout import Role, count_parameters, tensor_specs
from checkpoint.random_model import write_random_checkpoint
from checkpoint.shape import SHAPES
from checkpoint.tensor_files import INDEX_FILE
from checkpoint.tensors import Checkpoint

SMALLER = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 32,
    "intermediate_size_mlp": 48,
    "attention_chunk_size": 16,
    "floor_scale": 8,
    "max_position_embeddings": 256,
}
SCOUT = replace(SHAPES["scout"], **SMALLER, rope_scaling=RopeScaling(16.0, 1.0, 1.0, 64))
MAVERICK = replace(SHAPES["maverick"], **SMALLER)
TIED = replace(MAVERICK, tie_word_embeddings=True, num_experts_per_tok=2)
SMALL_SHAPES = {"scout": SCOUT, "maverick": MAVERICK, "tied": TIED}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def are_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)


@pytest.mark.parametrize("architecture", ["Llama4ForCausalLM", "Llama4ForConditionalGeneration"])
@pytest.mark.parametrize("shape", SMALL_SHAPES)
def test_transformers_loads_every_tensor_and_generates(shape: str, architecture: str, tmp_path: Path) -> None:
    config = write_random_checkpoint(tmp_path, SMALL_SHAPES[shape], std=0.2, architecture=architecture)
    model, info = load(tmp_path)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(config)[0]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    inputs = tokenizer("Hello there", return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8)
    assert made.shape[1] == inputs.input_ids.shape[1] + 8


def test_the_tokenizer_and_the_config_agree(tmp_path: Path) -> None:
    config = write_random_checkpoint(tmp_path, MAVERICK)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == config.vocab_size
    assert tokenizer.bos_token_id == config.bos_token_id
    assert tokenizer.convert_ids_to_tokens(list(config.eos_token_ids)) == ["<|end_of_text|>", "<|eom|>", "<|eot|>"]


def test_the_written_config_says_what_was_asked_for(tmp_path: Path) -> None:
    config = write_random_checkpoint(tmp_path, SCOUT, dtype="float16")
    assert config == Checkpoint.open(tmp_path).config
    assert (config.num_layers, config.num_experts, len(config.moe_layers)) == (4, 16, 4)
    assert (config.rope_scaling, config.use_qk_norm, config.dtype) == (SCOUT.rope_scaling, True, "float16")


@pytest.mark.parametrize(("shape", "gigabytes"), [("scout", "215.55"), ("maverick", "801.44")])
def test_a_released_shape_that_the_disk_cannot_hold_is_refused(
    shape: str, gigabytes: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5_000_000_000))
    with pytest.raises(CheckpointError, match=rf"out needs {gigabytes} GB, its disk has 5\.00 GB free"):
        write_random_checkpoint(tmp_path / "out", SHAPES[shape])
    assert not (tmp_path / "out").exists()


def test_the_demo_is_maverick_in_20_to_60_megabytes(tmp_path: Path) -> None:
    config = write_random_checkpoint(tmp_path, SHAPES["demo"])
    assert (config.num_experts, config.experts_per_token, config.use_qk_norm) == (128, 1, False)
    assert [layer.is_moe for layer in config.layers] == [False, True] * 4
    assert [layer.is_chunked for layer in config.layers] == [True, True, True, False] * 2
    assert 20e6 < sum(path.stat().st_size for path in tmp_path.iterdir()) < 60e6


def test_the_same_seed_gives_the_same_weights_however_files_are_cut(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "one", SCOUT, seed=3)
    write_random_checkpoint(tmp_path / "many", SCOUT, seed=3, max_file_bytes=100_000)
    assert not (tmp_path / "one" / INDEX_FILE).exists()
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 5
    assert are_equal(weights(tmp_path / "one"), weights(tmp_path / "many"))


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "3", SCOUT, seed=3)
    write_random_checkpoint(tmp_path / "4", SCOUT, seed=4)
    three, four = weights(tmp_path / "3"), weights(tmp_path / "4")
    assert not any(torch.equal(three[name], four[name]) for name in three)


def test_no_two_tensors_are_alike(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, MAVERICK)
    beginnings = [tuple(tensor.flatten()[:8].tolist()) for tensor in weights(tmp_path).values()]
    assert len(set(beginnings)) == len(beginnings)


def test_bfloat16_is_float32_rounded(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "wide", MAVERICK, dtype="float32")
    write_random_checkpoint(tmp_path / "narrow", MAVERICK, dtype="bfloat16")
    wide = weights(tmp_path / "wide")
    assert are_equal({name: tensor.bfloat16() for name, tensor in wide.items()}, weights(tmp_path / "narrow"))


def test_the_multimodal_class_has_the_same_text_model(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "text", MAVERICK)
    write_random_checkpoint(tmp_path / "multimodal", MAVERICK, architecture="Llama4ForConditionalGeneration")
    text = {f"language_model.{name}": tensor for name, tensor in weights(tmp_path / "text").items()}
    assert are_equal(text, weights(tmp_path / "multimodal"))


def test_weights_have_the_spread_asked_for(tmp_path: Path) -> None:
    config = write_random_checkpoint(tmp_path, MAVERICK, std=0.3, dtype="float32")
    stored = weights(tmp_path)
    for name, spec in tensor_specs(config).items():
        std = {Role.NORM: 0.1, Role.GATE: 2 / 64**0.5, Role.EMBEDDING: 1.0}.get(spec.role, 0.3)
        mean = 1.0 if spec.role is Role.NORM else 0.0
        assert float(stored[name].std()) == pytest.approx(std, rel=0.4 if spec.role is Role.NORM else 0.05), name
        assert float(stored[name].mean()) == pytest.approx(mean, abs=0.06), name


@pytest.mark.parametrize("std", [0.02, 0.3])
def test_routing_is_varied_in_every_layer(std: float, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, SHAPES["demo"], std=std)
    model, _ = load(tmp_path)
    chosen: list[torch.Tensor] = []
    for layer in model.model.layers[1::2]:
        layer.feed_forward.router.register_forward_hook(
            lambda module, inputs, output: chosen.append(output[1].argmax(-1))
        )
    tokens = torch.randint(0, 4000, (1, 256), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(tokens)
    assert [layer_chosen.unique().numel() > 64 for layer_chosen in chosen] == [True] * 4


def test_progress_counts_the_bytes_of_all_weights(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    config = write_random_checkpoint(tmp_path, MAVERICK, on_progress=lambda *pair: seen.append(pair))
    total = 2 * count_parameters(config)[0]
    assert seen[-1] == (total, total)
    assert [written for written, _ in seen] == sorted(written for written, _ in seen)


def test_a_directory_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not empty; name another directory, or ask for --overwrite"):
        write_random_checkpoint(tmp_path, MAVERICK)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_overwriting_replaces_the_old_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    write_random_checkpoint(tmp_path, SCOUT, max_file_bytes=100_000, overwrite=True)
    write_random_checkpoint(tmp_path, MAVERICK, overwrite=True)
    assert Checkpoint.open(tmp_path).config.num_experts == 128
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def interrupt(written: int, total: int) -> None:
    if written > total // 2:
        raise KeyboardInterrupt


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_random_checkpoint(tmp_path / "out", MAVERICK, on_progress=interrupt)
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_the_checkpoint_that_was_to_be_replaced(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, SCOUT)
    before = weights(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        write_random_checkpoint(tmp_path, MAVERICK, overwrite=True, on_progress=interrupt)
    assert Checkpoint.open(tmp_path).config.num_experts == 16
    assert are_equal(weights(tmp_path), before)


@pytest.mark.parametrize("moved", range(6))
def test_ctrl_c_while_files_move_into_place_leaves_nothing_that_loads(
    moved: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_random_checkpoint(tmp_path, SCOUT)
    rename, calls = Path.rename, iter(range(6))

    def interrupted_rename(path: Path, target: Path) -> Path:
        if next(calls) == moved:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted_rename)
    with pytest.raises(KeyboardInterrupt):
        write_random_checkpoint(tmp_path, MAVERICK, overwrite=True)
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        Checkpoint.open(tmp_path)


def test_a_killed_process_leaves_nothing_that_loads_and_does_not_block_the_next(tmp_path: Path) -> None:
    program = f"""
import os, signal
from checkpoint.random_model import write_random_checkpoint
from checkpoint.shape import SHAPES
def die(written, total):
    if written > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
write_random_checkpoint({str(tmp_path)!r}, SHAPES["demo"], on_progress=die)
"""
    killed = subprocess.run([sys.executable, "-c", program], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        Checkpoint.open(tmp_path)
    write_random_checkpoint(tmp_path, MAVERICK)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_two_processes_do_not_write_the_same_checkpoint(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(CheckpointError, match="is being written by another process"):
            write_random_checkpoint(tmp_path, MAVERICK)
    finally:
        os.close(descriptor)


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(CheckpointError, match=r"out cannot be written: .*File exists"):
        write_random_checkpoint(tmp_path / "out", MAVERICK)


BAD_OPTIONS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"dtype": "int8"}, "dtype is 'int8'; it must be one of bfloat16, float16, float32"),
    ({}, {"architecture": "Llama"}, "architecture is 'Llama'; it must be one of Llama4ForCausalLM, "),
    ({}, {"std": 0}, "std is 0; it must be above 0"),
    ({}, {"max_file_bytes": 0}, "max_file_bytes is 0; it must be at least 1"),
    ({"head_dim": 15}, {}, "the shape asked for: head_dim is 15; it must be even"),
    ({"num_experts_per_tok": 999}, {}, r"num_experts_per_tok is 999; it must be at most num_local_experts \(128\)"),
    ({"vocab_size": 100}, {}, "vocab_size is 100; must be at least 277"),
]


@pytest.mark.parametrize(("shape", "options", "message"), BAD_OPTIONS, ids=[case[2][:20] for case in BAD_OPTIONS])
def test_a_bad_option_is_named_and_nothing_written(
    shape: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_random_checkpoint(tmp_path / "out", replace(MAVERICK, **shape), **options)
    assert not (tmp_path / "out").exists()


def test_the_index_carries_the_total_size(tmp_path: Path) -> None:
    config = write_random_checkpoint(tmp_path, SCOUT, max_file_bytes=100_000)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 2 * count_parameters(config)[0]
    assert index["weight_map"].keys() == tensor_specs(config).keys()

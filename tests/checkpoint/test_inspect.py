"""A report says what a checkpoint holds and lists everything that is wrong with it, without raising."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint.config import RopeScaling
from checkpoint.errors import CheckpointError
from checkpoint.inspect import NOT_SERVED, UNKNOWN_ROLE, inspect_checkpoint
from checkpoint.random_model import write_random_checkpoint
from checkpoint.shape import SHAPES

TINY = replace(
    SHAPES["scout"],
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=24,
    attention_chunk_size=16,
    max_position_embeddings=128,
    rope_scaling=RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_positions=64),
)
EMBEDDING = 300 * 32
ONE_EXPERT = 3 * 32 * 24
ATTENTION = 32 * (4 + 2 + 2 + 4) * 8
LAYER_ALWAYS_ACTIVE = ATTENTION + ONE_EXPERT + 16 * 32 + 2 * 32  # attention, shared expert, gate, two norms
ALWAYS_ACTIVE = 2 * EMBEDDING + 32 + 4 * LAYER_ALWAYS_ACTIVE


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    write_random_checkpoint(tmp_path, TINY)
    return tmp_path


def test_a_whole_checkpoint(whole: Path) -> None:
    report = inspect_checkpoint(whole)
    assert report.problems == ()
    assert report.config is not None
    assert report.config.num_experts == 16
    assert report.total_parameters == ALWAYS_ACTIVE + 4 * 16 * ONE_EXPERT
    assert report.active_parameters == ALWAYS_ACTIVE + 4 * ONE_EXPERT
    assert (report.dtypes, report.num_files) == (("BF16",), 1)
    assert (report.has_tokenizer, report.has_chat_template) == (True, True)


def test_bytes_are_listed_by_role_largest_first(whole: Path) -> None:
    nbytes = inspect_checkpoint(whole).bytes_by_role
    assert nbytes["routed experts"] == 2 * 4 * 16 * ONE_EXPERT
    assert nbytes["shared expert"] == 2 * 4 * ONE_EXPERT
    assert nbytes["attention"] == 2 * 4 * ATTENTION
    assert nbytes["embedding"] == nbytes["output head"] == 2 * EMBEDDING
    assert list(nbytes.values()) == sorted(nbytes.values(), reverse=True)
    assert sum(nbytes.values()) == sum(t.nbytes for t in load_file(whole / "model.safetensors").values())


def test_kv_bytes_per_token_of_one_global_and_three_chunked_layers(whole: Path) -> None:
    report = inspect_checkpoint(whole)
    per_layer = 2 * 2 * 8 * 2  # key and value, 2 heads of 8, bfloat16
    assert (report.kv_bytes_per_token, report.kv_bytes_per_token_in_chunk) == (per_layer, 3 * per_layer)


def test_several_files_and_formats_are_counted(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, TINY, max_file_bytes=100_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    save_file({name: tensor.half() for name, tensor in load_file(files[0]).items()}, files[0])
    report = inspect_checkpoint(tmp_path)
    assert (report.num_files, report.dtypes, report.problems) == (len(files), ("BF16", "F16"), ())


def test_vision_tensors_are_counted_as_not_served(whole: Path) -> None:
    path = whole / "model.safetensors"
    save_file(load_file(path) | {"vision_model.class_embedding": torch.zeros(5)}, path)
    report = inspect_checkpoint(whole)
    assert (report.bytes_by_role[NOT_SERVED], report.problems) == (20, ())


def test_json_has_every_field(whole: Path) -> None:
    fields = json.loads(inspect_checkpoint(whole).to_json())
    assert fields["config"]["num_experts"] == 16
    assert fields["config"]["layers"][3] == {"uses_rope": False, "is_chunked": False, "is_moe": True}
    assert fields["config"]["rope_scaling"]["factor"] == 16.0
    assert fields["bytes_by_role"]["routed experts"] == 2 * 4 * 16 * ONE_EXPERT
    assert fields["problems"] == []


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def drop_tensor(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, directory / "model.safetensors")


def directory_in_the_way(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "bad config": (lambda d: edit_json(d / "config.json", hidden_size=-1), "hidden_size is -1"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has neither model.safetensors nor"),
    "damaged weights": (lambda d: (d / "model.safetensors").write_bytes(b"\0" * 99), "is no safetensors file"),
    "a tensor is missing": (drop_tensor, "model.norm.weight is missing"),
    "a directory in the way": (directory_in_the_way, "model.safetensors is no regular file"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json is missing, so text cannot become"),
    "damaged tokenizer": (lambda d: (d / "tokenizer.json").write_text("nope"), "tokenizer.json: not JSON"),
    "no tokenizer at all": (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer.json: not a tokenizer"),
    "damaged tokenizer config": (lambda d: (d / "tokenizer_config.json").write_text("["), "tokenizer_config.json: not"),
}


def test_what_is_odd_but_loads_is_a_warning_and_no_problem(whole: Path) -> None:
    edit_json(whole / "generation_config.json", eos_token_id=[280, 999])
    (whole / "model.safetensors.index.json").write_text("stale")
    report = inspect_checkpoint(whole)
    assert report.problems == ()
    assert [warning.split(": ", 1)[1] for warning in report.warnings] == [
        "eos_token_id 999 is ignored; vocab_size is 300",
        "delete what is not meant",
    ]


@pytest.mark.parametrize("name", DAMAGE)
def test_one_damage_is_one_problem(name: str, whole: Path) -> None:
    damage, message = DAMAGE[name]
    damage(whole)
    (problem,) = inspect_checkpoint(whole).problems
    assert message in problem


def test_a_tokenizer_larger_than_the_vocabulary(whole: Path) -> None:
    larger = whole / "larger"
    write_random_checkpoint(larger, replace(TINY, vocab_size=500))
    (larger / "tokenizer.json").rename(whole / "tokenizer.json")
    report = inspect_checkpoint(whole)
    assert report.problems == ()  # transformers, too, loads it
    assert "has token ids up to 499; the config's vocab_size is 300" in report.warnings[0]


def test_all_problems_are_listed_together(whole: Path) -> None:
    (whole / "config.json").unlink()
    (whole / "model.safetensors").write_bytes(b"")
    (whole / "tokenizer.json").unlink()
    report = inspect_checkpoint(whole)
    assert len(report.problems) == 3
    assert (report.config, report.total_parameters, report.kv_bytes_per_token) == (None, None, None)


def test_without_a_config_weights_are_still_counted(whole: Path) -> None:
    (whole / "config.json").unlink()
    report = inspect_checkpoint(whole)
    assert report.bytes_by_role == {UNKNOWN_ROLE: (whole / "model.safetensors").stat().st_size - header_bytes(whole)}


def header_bytes(directory: Path) -> int:
    """Bytes before the data in model.safetensors."""
    with open(directory / "model.safetensors", "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


@pytest.mark.parametrize("file_name", ["tokenizer_config.json", "chat_template.json"])
def test_a_chat_template_may_lie_in_a_json_file(file_name: str, whole: Path) -> None:
    (whole / "chat_template.jinja").unlink()
    assert not inspect_checkpoint(whole).has_chat_template
    (whole / file_name).write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert inspect_checkpoint(whole).has_chat_template


def test_a_missing_chat_template_is_no_problem(whole: Path) -> None:
    (whole / "chat_template.jinja").unlink()
    report = inspect_checkpoint(whole)
    assert (report.has_chat_template, report.problems) == (False, ())


def test_a_directory_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is no directory"):
        inspect_checkpoint(tmp_path / "nowhere")

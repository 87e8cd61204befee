"""Folders that are damaged or hostile: one clear line each, at once, whatever is in them."""

import json
import os
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from checkpoint.errors import CheckpointError, DroverError
from checkpoint.inspect import inspect_checkpoint
from checkpoint.random_model import write_random_checkpoint
from checkpoint.tensors import Checkpoint
from checkpoint.tokenizer import Tokenizer
from frontend.chat_template import ChatTemplate
from tests.checkpoint.test_inspect import TINY
from tests.command import drover
from tests.processes import PATIENCE_S

FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
JSON_FILES = tuple(name for name in FILES if name.endswith(".json"))
OPTIONAL = "generation_config.json"  # it is ignored, with a warning


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plain")
    write_random_checkpoint(directory, TINY)
    return directory


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    return shutil.copytree(plain, tmp_path / "folder")


def in_time(work: Callable[[], object]) -> None:
    """Do it, or fail if it never ends; a thread that hangs is left behind."""
    failure: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "it hangs"
    if failure:
        raise failure[0]


def refusal(folder: Path) -> str:
    """What somebody who serves it is told. Whoever inspects it must be told, too."""

    def serve() -> None:
        Checkpoint.open(folder)
        Tokenizer.open(folder)
        ChatTemplate.open(folder)

    inspections: list[CompletedProcess[str]] = []
    with pytest.raises(DroverError) as caught:
        in_time(serve)
    in_time(lambda: inspections.append(drover("checkpoint", "inspect", folder, "--json")))
    [done] = inspections
    problems = json.loads(done.stdout)["problems"]
    assert done.returncode == 1
    assert problems
    assert all("\n" not in problem for problem in problems)
    return str(caught.value)


def warning(folder: Path) -> str:
    """What somebody who serves it is told, and whoever inspects it."""
    warnings: list[str] = []
    in_time(lambda: warnings.extend(Checkpoint.open(folder).warnings))
    assert warnings == list(inspect_checkpoint(folder).warnings)
    [one] = warnings
    return one


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path)


def nowhere(path: Path) -> None:
    path.symlink_to("/nowhere/at/all")


def listener(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path must be short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


NO_FILES = {"FIFO": fifo, "device": device, "loop": loop, "nowhere": nowhere, "folder": Path.mkdir, "socket": listener}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_named_and_not_waited_for(name: str, kind: str, folder: Path) -> None:
    (folder / name).unlink()
    NO_FILES[kind](folder / name)
    message = warning(folder) if name == OPTIONAL else refusal(folder)
    assert str(folder / name) in message
    assert len(message.splitlines()) == 1


CONTENTS = {
    "nothing": b"",
    "cut": b'{"a": ',
    "no UTF-8": b'{"a": "\xff\xfe"}',
    "zero bytes": b"\x00" * 1000,
    "a list": b"[1, 2]",
    "a number": b"7",
    "deep": b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deep objects": b'{"a": ' * 100_000 + b"1" + b"}" * 100_000,
    "a long number": b'{"a": ' + b"9" * 100_000 + b"}",
    "two objects": b"{}{}",
}


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("content", CONTENTS)
def test_json_that_is_none_is_named(name: str, content: str, folder: Path) -> None:
    (folder / name).write_bytes(CONTENTS[content])
    message = warning(folder) if name == OPTIONAL else refusal(folder)
    assert str(folder / name) in message
    assert len(message.splitlines()) == 1
    assert len(message) < 600


@pytest.mark.parametrize("name", JSON_FILES)
def test_a_file_of_endless_length_is_not_read(name: str, folder: Path) -> None:
    os.truncate(folder / name, 2**40)  # sparse: it takes no room on the disk
    message = warning(folder) if name == OPTIONAL else refusal(folder)
    assert f"{folder / name} has more than {256 if name == 'tokenizer.json' else 16} MiB" in message


VALUES = [None, True, -1, 0, 10**30, 1.5, "", "x" * 1000, [], [[]], {}, {"": None}, [None] * 50]
CONFIG_FIELDS = [
    "architectures",
    "model_type",
    "text_config",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "intermediate_size_mlp",
    "num_local_experts",
    "num_experts_per_tok",
    "interleave_moe_layer_step",
    "moe_layers",
    "no_rope_layers",
    "no_rope_layer_interval",
    "layer_types",
    "attention_chunk_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "use_qk_norm",
    "attn_temperature_tuning",
    "floor_scale",
    "attn_scale",
    "attention_bias",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "dtype",
    "torch_dtype",
    "hidden_act",
    "quantization_config",
]


@pytest.mark.parametrize("field", CONFIG_FIELDS)
def test_any_value_of_a_config_field_is_served_or_refused_in_one_line(field: str, folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for value in VALUES:
        path.write_text(json.dumps(config | {field: value}))
        try:
            in_time(lambda: Checkpoint.open(folder))
        except CheckpointError as error:
            first, *_ = str(error).splitlines()
            assert len(first) < 600
        in_time(lambda: inspect_checkpoint(folder))


def header(folder: Path) -> dict[str, dict[str, object]]:
    data = (folder / "model.safetensors").read_bytes()
    parsed: dict[str, dict[str, object]] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return parsed


def with_header(folder: Path, fields: object) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    old = int.from_bytes(data[:8], "little")
    text = json.dumps(fields).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + old :])


Entries = dict[str, dict[str, object]]
NORM = "model.norm.weight"


def overlapping(entries: Entries) -> None:
    first, second = [entry for name, entry in entries.items() if name != "__metadata__" and entry["dtype"] == "BF16"][
        :2
    ]
    second["data_offsets"], second["shape"] = first["data_offsets"], first["shape"]


HEADERS: dict[str, Callable[[Entries], object]] = {
    "overlapping tensors": overlapping,
    "a hole": lambda entries: entries.pop(NORM),
    "negative offsets": lambda entries: entries[NORM].update(data_offsets=[-64, 0]),
    "offsets beyond the file": lambda entries: entries[NORM].update(data_offsets=[2**40, 2**40 + 64]),
    "huge offsets": lambda entries: entries[NORM].update(data_offsets=[0, 10**300]),
    "offsets that are no numbers": lambda entries: entries[NORM].update(data_offsets=["0", "64"]),
    "a huge shape": lambda entries: entries[NORM].update(shape=[2**62, 2**62]),
    "a negative shape": lambda entries: entries[NORM].update(shape=[-8, -4]),
    "true as a length": lambda entries: entries[NORM].update(shape=[True]),
    "many dimensions": lambda entries: entries[NORM].update(shape=[1] * 100_000),
    "an unknown dtype": lambda entries: entries[NORM].update(dtype="F8_E4M3", shape=[64]),
    "a name that drives a terminal": lambda entries: entries.update({"\x1b[2J\nx": entries.pop(NORM)}),
    "a dtype that drives a terminal": lambda entries: entries[NORM].update(dtype="\x1b[2J\nx"),
    "a dtype that is no text": lambda entries: entries[NORM].update(dtype=None),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused(name: str, folder: Path) -> None:
    entries = header(folder)
    HEADERS[name](entries)
    with_header(folder, entries)
    message = refusal(folder)
    assert "model.safetensors" in message or NORM in message
    assert message.isprintable()
    assert len(message) < 1000


TEMPLATES = {"chat_template.jinja": "{% if %}", "tokenizer_config.json": '{"chat_template": 3}'}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_is_none_is_named(name: str, folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / name).write_text(TEMPLATES[name])
    assert str(folder / name) in refusal(folder)


OUTSIDE = ("../secret.safetensors", "/etc/passwd", "..", "", "a/b", "nul\0byte", "\n\x1b[31m", "x" * 3000)


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_may_only_name_files_beside_it(name: str, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "secret.safetensors")
    index = {"weight_map": {NORM: name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refusal(folder)
    assert "model.safetensors.index.json: weight_map puts 'model.norm.weight' into " in message
    assert message.isprintable()
    assert len(message) < 600


def test_a_folder_that_may_not_be_searched_is_named(folder: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may search every folder")
    folder.chmod(0)
    try:
        assert str(folder) in refusal(folder)
    finally:
        folder.chmod(0o700)


def test_experts_beyond_all_files_are_refused_before_they_are_listed(folder: Path) -> None:
    """4096 layers of 65536 unfused experts, of which there is one."""
    entries = header(folder)
    entries["model.layers.0.feed_forward.experts.0.gate_proj.weight"] = entries.pop(NORM)
    with_header(folder, entries)
    config = json.loads((folder / "config.json").read_text())
    huge = {"num_hidden_layers": 4096, "num_local_experts": 65_536, "no_rope_layers": [], "layer_types": None}
    (folder / "config.json").write_text(json.dumps(config | huge | {"moe_layers": None}))
    assert "the config calls for 805306368 tensors of experts" in refusal(folder)


def test_of_many_numbered_files_the_missing_are_counted_and_not_listed(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-99999.safetensors")
    assert "has 1 of 99999 files model-*-of-99999.safetensors" in refusal(folder)


def test_of_numbered_sets_the_complete_one_counts(folder: Path) -> None:
    single = folder / "model.safetensors"
    shutil.copy(single, folder / "model-00001-of-00001.safetensors")
    assert "model.safetensors, which is loaded, and model-*-of-00001.safetensors" in warning(folder)
    shutil.copy(single, folder / "model-00001-of-00003.safetensors")  # of a download that was given up
    single.rename(folder / "model-00002-of-00002.safetensors")
    assert Checkpoint.open(folder).warnings == ()
    for number in (1, 3):
        shutil.copy(folder / "model-00001-of-00001.safetensors", folder / f"model-0000{number}-of-00003.safetensors")
    shutil.copy(folder / "model-00001-of-00001.safetensors", folder / "model-00002-of-00003.safetensors")
    assert "model-*-of-00003.safetensors, which is loaded, and model-*-of-00001.safetensors" in warning(folder)

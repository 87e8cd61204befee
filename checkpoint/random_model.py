"""Writes checkpoints with random weights: Scout's or Maverick's shape, scaled down to whatever a machine holds.

What comes out is a complete Hugging Face Llama 4 directory (weights, config, generation config, tokenizer, chat
template), which transformers loads as it is. Weights are drawn and written block by block, so this takes less than
100 MB of memory whatever the model's size (measured: 70 MB for a file of 610 MB).
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoint.config import ARCHITECTURES, ModelConfig, RopeScaling, parse_config
from checkpoint.errors import CheckpointError
from checkpoint.layout import Role, TensorSpec, tensor_specs
from checkpoint.tensors import INDEX_FILE, SINGLE_FILE, STORED_DTYPES
from checkpoint.tokenizer_files import TokenizerIds, write_byte_tokenizer

_HEADER_NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in STORED_DTYPES.items()}
_BLOCK_VALUES = 1 << 22
_TOKENIZER_BYTES_PER_TOKEN = 64  # measured: 47 at 202,048 tokens, less at fewer
_STAGING = ".partial"
_OUR_FILES = ("config.json", "*.safetensors", INDEX_FILE, "generation_config.json", "tokenizer*.json", "*.jinja")


@dataclass(frozen=True)
class ModelShape:
    """The hyperparameters in a Llama 4 config.json, by the names they have there; the defaults are Maverick's.

    rope_scaling is ours: config.json spreads it over `rope_parameters`.
    """

    vocab_size: int = 202048
    hidden_size: int = 5120
    num_hidden_layers: int = 48
    num_attention_heads: int = 40
    num_key_value_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 8192
    intermediate_size_mlp: int = 16384
    num_local_experts: int = 128
    num_experts_per_tok: int = 1
    interleave_moe_layer_step: int = 2
    no_rope_layer_interval: int = 4
    attention_chunk_size: int = 8192
    max_position_embeddings: int = 1_048_576
    use_qk_norm: bool = False
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    attn_temperature_tuning: bool = True
    floor_scale: int = 8192
    attn_scale: float = 0.1
    tie_word_embeddings: bool = False


SHAPES: Mapping[str, ModelShape] = {
    "scout": ModelShape(
        num_local_experts=16,
        interleave_moe_layer_step=1,
        max_position_embeddings=10_485_760,
        use_qk_norm=True,
        rope_scaling=RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_positions=8192),
    ),
    "maverick": ModelShape(),
    # Maverick in 55 MB of bf16; its chunks are short, so that a page of text crosses one.
    "demo": ModelShape(
        vocab_size=4096,
        hidden_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=128,
        intermediate_size_mlp=256,
        attention_chunk_size=512,
        floor_scale=512,
        max_position_embeddings=16384,
    ),
}


def write_random_checkpoint(
    directory: Path | str,
    shape: ModelShape,
    *,
    dtype: str = "bfloat16",
    std: float = 0.02,
    seed: int = 0,
    architecture: str = "Llama4ForCausalLM",
    max_file_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> ModelConfig:
    """Write a checkpoint of `shape` with random weights, and return what its config says.

    Weights are normal with standard deviation `std`, but for what keeps routing varied: norm weights lie around 1,
    expert gates give logits that spread by 2, and untied embeddings have 1 (smaller ones drown in what attention
    adds, which is much the same for all tokens: measured, 8 of 128 experts then got every token of the last layer).
    Each tensor depends on (seed, its name, its shape) only, not on how files are cut; a 16-bit checkpoint is the
    float32 one of the same seed, rounded.

    Llama4ForConditionalGeneration writes the same text model under that class's names, and no vision tensors.
    max_file_bytes: begin another file where tensors would exceed it; one tensor is never split.
    overwrite: replace a checkpoint that is already there. Files that belong to no checkpoint are left alone.
    on_progress: called with (bytes of weights written, bytes of weights in all).

    The directory gets its config.json last, after everything else: an interrupted call leaves nothing that loads.
    Raises CheckpointError if an option is not valid, the disk is full or the directory not empty.
    """
    if dtype not in _HEADER_NAMES:
        raise CheckpointError(f"dtype is {dtype!r}; it must be one of {', '.join(_HEADER_NAMES)}")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(f"architecture is {architecture!r}; it must be one of {', '.join(ARCHITECTURES)}")
    if not 0 < std < 100:
        raise CheckpointError(f"std is {std}; it must be above 0 and below 100")
    if max_file_bytes < 1:
        raise CheckpointError(f"max_file_bytes is {max_file_bytes}; it must be at least 1")
    config = parse_config(_config_json(shape, dtype, architecture, None), "the shape asked for")
    weights = _RandomWeights(config, dtype, std, seed)
    needed_bytes = weights.total_bytes + shape.vocab_size * _TOKENIZER_BYTES_PER_TOKEN
    with _staging_directory(Path(directory), needed_bytes, overwrite) as staging:
        ids = write_byte_tokenizer(staging, shape.vocab_size)
        weights.write(staging, max_file_bytes, on_progress or (lambda written, total: None))
        raw = _config_json(shape, dtype, architecture, ids)
        _write_json(staging / "generation_config.json", {"do_sample": True, **_token_id_fields(ids)})
        _write_json(staging / "config.json", raw)
    return parse_config(raw, f"{directory}/config.json")


class _RandomWeights:
    """All tensors of a model, drawn block by block while they are written."""

    def __init__(self, config: ModelConfig, dtype: str, std: float, seed: int) -> None:
        self._config = config
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._header_name = _HEADER_NAMES[dtype]
        self._std = std
        self._seed = seed
        self._specs = tensor_specs(config)
        self.total_bytes = sum(self._nbytes(spec) for spec in self._specs.values())

    def write(self, directory: Path, max_file_bytes: int, on_progress: Callable[[int, int], None]) -> None:
        """One model.safetensors if everything fits max_file_bytes, else numbered files and their index."""
        files: list[list[str]] = [[]]
        file_bytes = 0
        for name, spec in self._specs.items():
            if files[-1] and file_bytes + self._nbytes(spec) > max_file_bytes:
                files.append([])
                file_bytes = 0
            files[-1].append(name)
            file_bytes += self._nbytes(spec)
        if len(files) == 1:
            file_names = [SINGLE_FILE]
        else:
            file_names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
            weight_map = {name: file for file, names in zip(file_names, files, strict=True) for name in names}
            _write_json(
                directory / INDEX_FILE, {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            )
        written = 0
        for file_name, names in zip(file_names, files, strict=True):
            for count in self._write_file(directory / file_name, names):
                written += count
                on_progress(written, self.total_bytes)

    def _write_file(self, path: Path, names: list[str]) -> Iterator[int]:
        """Write one safetensors file, and yield the number of bytes after each block."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            begin, end = end, end + self._nbytes(self._specs[name])
            shape = self._specs[name].shape
            header[name] = {"dtype": self._header_name, "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the format wants data to begin at a multiple of 8
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                for block in self._draw(name, self._specs[name]):
                    yield file.write(block.view(torch.uint8).numpy().data)

    def _draw(self, name: str, spec: TensorSpec) -> Iterator[torch.Tensor]:
        """The values of one tensor in order, in flat blocks."""
        mean, std = 0.0, self._std
        if spec.role is Role.NORM:
            mean, std = 1.0, 0.1
        elif spec.role is Role.EMBEDDING and not self._config.tie_word_embeddings:
            std = 1.0
        elif spec.role is Role.GATE:
            std = 2 / self._config.hidden_size**0.5  # its inputs have RMS 1
        bare_name = name.removeprefix(self._config.tensor_prefix)
        digest = hashlib.sha256(f"{self._seed} {bare_name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        for start in range(0, spec.parameters, _BLOCK_VALUES):
            block = torch.randn(min(_BLOCK_VALUES, spec.parameters - start), generator=generator)
            yield block.mul_(std).add_(mean).to(self._dtype)

    def _nbytes(self, spec: TensorSpec) -> int:
        return spec.parameters * self._dtype.itemsize


def _config_json(shape: ModelShape, dtype: str, architecture: str, ids: TokenizerIds | None) -> dict[str, Any]:
    fields = asdict(shape)
    scaling, theta = fields.pop("rope_scaling"), fields.pop("rope_theta")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if scaling is not None:
        original = scaling.pop("original_positions")
        rope |= {"rope_type": "llama3", "original_max_position_embeddings": original, **scaling}
    text = {"model_type": "llama4_text", **fields, "rope_parameters": rope, "dtype": dtype}
    if ids is not None:
        text |= _token_id_fields(ids)
    if architecture == "Llama4ForCausalLM":
        return {"architectures": [architecture], **text}
    # The outer flag repeats the inner one because transformers looks at either, depending on the class.
    outer = {"tie_word_embeddings": shape.tie_word_embeddings, "dtype": dtype}
    return {"architectures": [architecture], "model_type": "llama4", "text_config": text, **outer}


def _token_id_fields(ids: TokenizerIds) -> dict[str, Any]:
    return {
        "bos_token_id": ids.bos_token_id,
        "eos_token_id": list(ids.eos_token_ids),
        "pad_token_id": ids.pad_token_id,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _staging_directory(directory: Path, needed_bytes: int, overwrite: bool) -> Iterator[Path]:
    """A directory to write into; its files move into `directory` at the end if nothing was raised.

    It lies inside `directory`, which may be a mounted volume that cannot be renamed.
    """
    is_new = not directory.exists()
    lock = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = _lock(directory)
        if not overwrite and any(path.name != _STAGING for path in directory.iterdir()):
            raise CheckpointError(f"{directory} is not empty; name another directory, or ask for --overwrite")
        staging = directory / _STAGING
        shutil.rmtree(staging, ignore_errors=True)  # left by a killed process
        free_bytes = shutil.disk_usage(directory).free
        if needed_bytes > free_bytes:
            raise CheckpointError(
                f"{directory} needs {needed_bytes / 1e9:.2f} GB, its disk has {free_bytes / 1e9:.2f} GB free"
            )
        staging.mkdir()
        try:
            yield staging
            _publish(staging, directory)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error}") from None
    finally:
        if lock is not None:
            os.close(lock)
        if is_new and directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()


def _publish(staging: Path, directory: Path) -> None:
    # The old config.json goes first and the new one comes last: in between, nothing here loads.
    for pattern in _OUR_FILES:
        for old in directory.glob(pattern):
            old.unlink()
    for new in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
        new.rename(directory / new.name)


def _lock(directory: Path) -> int:
    """Keep other processes from writing the same checkpoint; returns the descriptor that holds the lock."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CheckpointError(f"{directory} is being written by another process") from None
    except OSError:
        pass  # a file system without locks
    return descriptor

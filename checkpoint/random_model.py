"""Writes checkpoints with random weights: Scout's or Maverick's shape, or a smaller one.

The result is a complete Hugging Face Llama 4 directory: weights, config, generation config,
tokenizer, chat template. transformers loads it as it is. Weights are drawn and written block by
block, so memory stays below 100 MB for any model size (measured: 70 MB for a file of 610 MB).
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from checkpoint.config import ModelConfig, parse_config
from checkpoint.errors import CheckpointError
from checkpoint.layout import Role, TensorSpec, tensor_specs
from checkpoint.make_tokenizer import write_byte_tokenizer
from checkpoint.naming import ARCHITECTURES
from checkpoint.shape import ModelShape, config_json, split_into_files, token_id_fields, write_index, write_json
from checkpoint.staging import staging_directory
from checkpoint.tensor_files import STORED_DTYPES

_HEADER_NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in STORED_DTYPES.items()}
_BLOCK_VALUES = 1 << 22
_TOKENIZER_BYTES_PER_TOKEN = 64  # measured: 47 at 202,048 tokens, less at fewer


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
    """Write a checkpoint of `shape` with random weights. Returns its config.

    Weights are normal with standard deviation `std`. Three exceptions keep the experts' load
    varied: norm weights are around 1, expert gates give logits with standard deviation 2, and
    untied embeddings have standard deviation 1. (Smaller embeddings drown in attention's output,
    which is similar for all tokens. Measured: 8 of 128 experts then got every token of the last
    layer.)

    Each tensor depends on (seed, name, shape) only, not on the division into files. A 16-bit
    checkpoint is the float32 one of the same seed, rounded.

    architecture: Llama4ForConditionalGeneration writes the same text model under that class's
    names, without vision.
    max_file_bytes: begin another file where tensors would exceed it. One tensor is never split.
    overwrite: replace an existing checkpoint. Files that belong to no checkpoint stay.
    on_progress: called with (bytes of weights written, bytes of weights in total).

    config.json is written last, so an interrupted call leaves nothing that loads.
    Raises CheckpointError if an option is invalid, the disk is too small or the directory is not
    empty.
    """
    if dtype not in _HEADER_NAMES:
        raise CheckpointError(f"dtype is {dtype!r}; it must be one of {', '.join(_HEADER_NAMES)}")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(f"architecture is {architecture!r}; it must be one of {', '.join(ARCHITECTURES)}")
    if not 0 < std < 100:
        raise CheckpointError(f"std is {std}; it must be above 0 and below 100")
    if max_file_bytes < 1:
        raise CheckpointError(f"max_file_bytes is {max_file_bytes}; it must be at least 1")
    config = parse_config(config_json(shape, dtype, architecture, None), "the shape asked for")
    weights = _RandomWeights(config, dtype, std, seed)
    needed_bytes = weights.total_bytes + shape.vocab_size * _TOKENIZER_BYTES_PER_TOKEN
    with staging_directory(Path(directory), needed_bytes, overwrite) as staging:
        ids = write_byte_tokenizer(staging, shape.vocab_size)
        weights.write(staging, max_file_bytes, on_progress or (lambda written, total: None))
        raw = config_json(shape, dtype, architecture, ids)
        write_json(staging / "generation_config.json", {"do_sample": True, **token_id_fields(ids)})
        write_json(staging / "config.json", raw)
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
        """One model.safetensors, or numbered files with an index if max_file_bytes requires it."""
        files = split_into_files({name: self._nbytes(spec) for name, spec in self._specs.items()}, max_file_bytes)
        file_names = write_index(directory, files, self.total_bytes)
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
        """The values of one tensor, in order, as flat blocks."""
        mean, std = 0.0, self._std
        if spec.role is Role.NORM:
            mean, std = 1.0, 0.1
        elif spec.role is Role.EMBEDDING and not self._config.tie_word_embeddings:
            std = 1.0
        elif spec.role is Role.GATE:
            std = 2 / self._config.hidden_size**0.5  # its inputs have RMS 1
        bare_name = name.removeprefix(self._config.naming.decoder.removesuffix("model."))
        digest = hashlib.sha256(f"{self._seed} {bare_name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        for start in range(0, spec.parameters, _BLOCK_VALUES):
            block = torch.randn(min(_BLOCK_VALUES, spec.parameters - start), generator=generator)
            yield block.mul_(std).add_(mean).to(self._dtype)

    def _nbytes(self, spec: TensorSpec) -> int:
        return spec.parameters * self._dtype.itemsize

"""Reads tensors, or ranges of their rows, out of a directory of safetensors files.

Files are read with pread at the exact offsets that their headers give, not mapped: one Maverick expert tensor has
21.5 GB, a process wants a few rows of it, and `bytes_read` says exactly what it cost. Only the JSON header is
interpreted, so nothing in a checkpoint is executed. Format: https://github.com/huggingface/safetensors#format
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from checkpoint.config import ModelConfig, read_config, read_json
from checkpoint.errors import CheckpointError
from checkpoint.layout import tensor_specs

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_MAX_HEADER_BYTES = 100_000_000  # the limit that the safetensors library sets


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies. offset: of its first byte in the file; dtype: the header's name, such as BF16."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Checkpoint:
    """A Llama 4 checkpoint directory, opened: its config and where every tensor lies. No weights are read yet."""

    def __init__(self, directory: Path, config: ModelConfig, entries: dict[str, TensorEntry]) -> None:
        self.directory = directory
        self.config = config
        self.entries = entries
        self.bytes_read = 0
        """Bytes of tensor data read so far through this object."""

    @classmethod
    def open(cls, directory: Path | str) -> "Checkpoint":
        """Read config and headers, and check that every tensor is there with its shape.

        Raises CheckpointError listing what is missing, truncated or inconsistent.
        """
        checkpoint = cls.open_unchecked(directory)
        problems = checkpoint.problems()
        if problems:
            shown = "\n  ".join(problems[:10])
            more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
            raise CheckpointError(f"checkpoint {directory} cannot be served:\n  {shown}{more}")
        return checkpoint

    @classmethod
    def open_unchecked(cls, directory: Path | str) -> "Checkpoint":
        """Like open, but leaves the comparison of tensors with the config to the caller."""
        directory = Path(directory)
        if not directory.is_dir():
            raise CheckpointError(f"checkpoint {directory} is no directory")
        config = read_config(directory)
        return cls(directory, config, _read_entries(directory))

    def problems(self) -> list[str]:
        """What is missing, or differs from what the config calls for; one line each, empty if all is well."""
        found = []
        for name, spec in tensor_specs(self.config).items():
            entry = self.entries.get(name)
            if entry is None:
                found.append(f"{name} is missing")
            elif entry.shape != spec.shape:
                found.append(f"{name} has shape {list(entry.shape)}; the config calls for {list(spec.shape)}")
            elif entry.dtype not in _DTYPES:
                found.append(f"{name} has dtype {entry.dtype}; supported are {', '.join(_DTYPES)}")
        return found

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The whole tensor, converted to `dtype`."""
        return self.read_rows(name, 0, self.entries[name].shape[0], dtype)

    def read_rows(
        self, name: str, start: int, stop: int, dtype: torch.dtype, on_bytes: Callable[[int], None] | None = None
    ) -> torch.Tensor:
        """Rows start..stop-1 along dimension 0, converted to `dtype`; reads no other bytes.

        on_bytes: called with the number of bytes of each piece read, for progress.
        Raises CheckpointError if the file ends early or cannot be read.
        """
        entry = self.entries[name]
        assert 0 <= start <= stop <= entry.shape[0], f"rows {start}:{stop} of {name} {entry.shape}"
        row_bytes = entry.nbytes // entry.shape[0]
        buffer = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
        view = buffer.numpy().data
        try:
            with open(entry.path, "rb", buffering=0) as file:
                position = 0
                while position < len(view):
                    piece = view[position : position + (64 << 20)]
                    count = os.preadv(file.fileno(), [piece], entry.offset + start * row_bytes + position)
                    if count == 0:
                        raise CheckpointError(f"{entry.path} ends inside {name}; the file is truncated")
                    position += count
                    self.bytes_read += count
                    if on_bytes is not None:
                        on_bytes(count)
        except OSError as error:
            raise CheckpointError(f"{entry.path} cannot be read: {error}") from None
        return buffer.view(_DTYPES[entry.dtype]).view(stop - start, *entry.shape[1:]).to(dtype)


def _read_entries(directory: Path) -> dict[str, TensorEntry]:
    index_path = directory / INDEX_FILE
    if not index_path.exists():
        single = directory / SINGLE_FILE
        if not single.exists():
            raise CheckpointError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}")
        return _read_header(single)
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index_path} has no weight_map object")
    entries: dict[str, TensorEntry] = {}
    for file_name in sorted(set(weight_map.values())):
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise CheckpointError(
                f"{index_path}: weight_map names {file_name!r}; a file in the same directory is expected"
            )
        header = _read_header(directory / file_name)
        entries |= {name: entry for name, entry in header.items() if weight_map.get(name) == file_name}
    return entries


def _read_header(path: Path) -> dict[str, TensorEntry]:
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path} is no safetensors file, or is truncated ({size} bytes)")
            header = json.loads(file.read(header_bytes))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing, but {INDEX_FILE} names it") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} has an unreadable header: {error}") from None
    entries = {}
    for name, fields in header.items():
        if name == "__metadata__":
            continue
        try:
            begin, end = fields["data_offsets"]
            entry = TensorEntry(
                path, str(fields["dtype"]), tuple(fields["shape"]), 8 + header_bytes + begin, end - begin
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: the header entry of {name} is damaged: {error!r}") from None
        if entry.offset < 8 + header_bytes or entry.offset + entry.nbytes > size:
            raise CheckpointError(
                f"{path} is truncated: {name} ends at byte {entry.offset + entry.nbytes}, the file has {size}"
            )
        if entry.dtype in _DTYPES and entry.nbytes != prod(entry.shape) * _DTYPES[entry.dtype].itemsize:
            raise CheckpointError(f"{path}: {name} has {entry.nbytes} bytes, not those of {entry.dtype} {entry.shape}")
        entries[name] = entry
    return entries

"""Reads tensors, or ranges of their rows, from a directory of safetensors files.

Files are not memory-mapped but read with pread, at the offsets in their headers. A process wants
only some rows of a tensor (one Maverick expert tensor has 21.5 GB), and `bytes_read` counts
exactly what was read. Only the JSON header is interpreted, so nothing in a checkpoint is executed.
Format: https://github.com/huggingface/safetensors#format
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from checkpoint.config import ModelConfig, read_config, read_json
from checkpoint.errors import CheckpointError, listed
from checkpoint.layout import tensor_specs

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_MAX_HEADER_BYTES = 100_000_000  # the limit that the safetensors library sets


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor is stored.

    offset: of its first byte in the file. dtype: name in the header, such as BF16.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class TensorFiles:
    """The safetensors files of one directory.

    paths: the readable files. entries: their tensors by name.
    problems: one line for each missing or damaged file. lost: the tensors that the index places in
    these files.
    """

    paths: tuple[Path, ...]
    entries: dict[str, TensorEntry]
    problems: tuple[str, ...] = ()
    lost: frozenset[str] = frozenset()

    def compare(self, config: ModelConfig) -> list[str]:
        """One line for each tensor or file that is missing, damaged, or not as in `config`."""
        found = list(self.problems)
        if not self.entries and found:
            return found  # no file is readable: do not list every tensor as missing, too
        for name, spec in tensor_specs(config).items():
            entry = self.entries.get(name)
            if entry is None:
                if name not in self.lost:
                    found.append(f"{name} is missing")
            elif entry.shape != spec.shape:
                found.append(f"{name} has shape {list(entry.shape)}; the config calls for {list(spec.shape)}")
            elif entry.dtype not in STORED_DTYPES:
                found.append(f"{name} has dtype {entry.dtype}; supported are {', '.join(STORED_DTYPES)}")
        return found


class Checkpoint:
    """An open Llama 4 checkpoint directory: its config, and where each tensor is stored.

    Weights are read on demand.
    """

    def __init__(self, directory: Path, config: ModelConfig, files: TensorFiles) -> None:
        self.directory = directory
        self.config = config
        self.entries = files.entries
        self.bytes_read = 0
        """Bytes of tensor data read through this object so far."""

    @classmethod
    def open(cls, directory: Path | str) -> "Checkpoint":
        """Read config and headers, and check that every tensor exists with the right shape.

        Raises CheckpointError, which lists what is missing, truncated or inconsistent.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise CheckpointError(f"checkpoint {directory} is no directory")
        config = read_config(directory)
        files = read_tensor_files(directory)
        problems = files.compare(config)
        if problems:
            more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
            raise CheckpointError(f"checkpoint {directory} cannot be served:{listed(problems[:10] + more)}")
        return cls(directory, config, files)

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The whole tensor, converted to `dtype`."""
        return self.read_rows(name, 0, self.entries[name].shape[0], dtype)

    def read_rows(
        self, name: str, start: int, stop: int, dtype: torch.dtype, on_bytes: Callable[[int], None] | None = None
    ) -> torch.Tensor:
        """Rows start..stop-1 along dimension 0, converted to `dtype`. Reads no other bytes.

        on_bytes: called with the size of each piece read, for progress.
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
        return buffer.view(STORED_DTYPES[entry.dtype]).view(stop - start, *entry.shape[1:]).to(dtype)


def read_tensor_files(directory: Path) -> TensorFiles:
    """Read the headers of all safetensors files in `directory`.

    Damaged or missing files are listed, not raised.
    """
    index_path, single = directory / INDEX_FILE, directory / SINGLE_FILE
    try:
        if index_path.exists():
            return _read_indexed_files(index_path)
        if single.exists():
            return TensorFiles((single,), _read_header(single))
        return TensorFiles((), {}, (f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}",))
    except CheckpointError as error:
        return TensorFiles((), {}, (str(error),))


def _read_indexed_files(index_path: Path) -> TensorFiles:
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: weight_map must be an object that names each tensor's file")
    names_by_file: dict[str, set[str]] = {}
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or file_name in ("", "..") or Path(file_name).name != file_name:
            raise CheckpointError(
                f"{index_path}: weight_map puts {name} into {file_name!r}; a file of the same directory is expected"
            )
        names_by_file.setdefault(file_name, set()).add(name)
    paths: list[Path] = []
    entries: dict[str, TensorEntry] = {}
    problems: list[str] = []
    lost: set[str] = set()
    for file_name, names in sorted(names_by_file.items()):
        path = index_path.parent / file_name
        try:
            entries |= {name: entry for name, entry in _read_header(path).items() if name in names}
            paths.append(path)
        except CheckpointError as error:
            problems.append(f"{error} ({len(names)} tensors)")
            lost |= names
    return TensorFiles(tuple(paths), entries, tuple(problems), frozenset(lost))


def _read_header(path: Path) -> dict[str, TensorEntry]:
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path} is no safetensors file, or is truncated ({size} bytes)")
            header = json.loads(file.read(header_bytes))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has an unreadable header: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has an unreadable header: a {type(header).__name__}, not an object")
    data_start = 8 + header_bytes
    return {
        name: _parse_entry(path, name, fields, data_start, size)
        for name, fields in header.items()
        if name != "__metadata__"
    }


def _parse_entry(path: Path, name: str, fields: object, data_start: int, file_size: int) -> TensorEntry:
    """One tensor's entry in a header, checked against the file.

    data_start: the byte that offsets are relative to.
    """
    match fields:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
            all(isinstance(length, int) and length >= 0 for length in shape) and 0 <= begin <= end
        ):
            entry = TensorEntry(path, dtype, tuple(shape), data_start + begin, end - begin)
        case _:
            raise CheckpointError(f"{path}: the header entry of {name} is damaged: {fields!r:.200}")
    if data_start + end > file_size:
        raise CheckpointError(f"{path} is truncated: {name} ends at byte {data_start + end}, the file has {file_size}")
    if entry.dtype in STORED_DTYPES and entry.nbytes != prod(entry.shape) * STORED_DTYPES[entry.dtype].itemsize:
        raise CheckpointError(
            f"{path}: {name} has {entry.nbytes} bytes, which does not fit {entry.dtype} {list(entry.shape)}"
        )
    return entry

"""Finds the tensors in a directory of safetensors files: which files count, and what their headers say.

Which files: as in transformers, `model.safetensors` counts before an index. Without either, the
files of the largest complete set model-00001-of-0000N.safetensors do.
Format: https://github.com/huggingface/safetensors#format
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from checkpoint.errors import CheckpointError, quoted
from checkpoint.read_file import is_there, open_regular, parse_json, read_json

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_MAX_HEADER_BYTES = 32 * 2**20  # of a quarter of a million tensors; as JSON it takes a gigabyte of memory
_MAX_LENGTH = 2**48  # of a dimension, and of a tensor in bytes


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
    these files. warnings: what is odd, but loads.
    """

    paths: tuple[Path, ...]
    entries: dict[str, TensorEntry]
    problems: tuple[str, ...] = ()
    lost: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()

    @property
    def dtype(self) -> str | None:
        """The dtype that most bytes of weights have, as torch names it; None if there are none."""
        nbytes: Counter[str] = Counter()
        for entry in self.entries.values():
            if entry.dtype in STORED_DTYPES:
                nbytes[entry.dtype] += entry.nbytes
        return str(STORED_DTYPES[nbytes.most_common(1)[0][0]]).removeprefix("torch.") if nbytes else None


def read_tensor_files(directory: Path) -> TensorFiles:
    """Read the headers of all safetensors files in `directory`.

    Damaged or missing files are listed, not raised.
    """
    index_path, single = directory / INDEX_FILE, directory / SINGLE_FILE
    try:
        sets = _numbered_sets(directory)
        complete = [_set_name(total) for total in sorted(sets) if sets[total] == total]
        if is_there(single):
            others = [INDEX_FILE] if is_there(index_path) else complete
            return TensorFiles((single,), _read_header(single), warnings=_other_sets(directory, SINGLE_FILE, others))
        if is_there(index_path):
            return _read_files(directory, _files_of_index(index_path))
        if numbered := _numbered_files(directory, sets):
            loaded = _set_name(len(numbered))
            others = [name for name in complete if name != loaded]
            files = _read_files(directory, dict.fromkeys(numbered))
            return replace(files, warnings=_other_sets(directory, loaded, others))
        return TensorFiles((), {}, (f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}",))
    except CheckpointError as error:
        return TensorFiles((), {}, (str(error),))


def _numbered_sets(directory: Path) -> "Counter[int]":
    """How many files there are of each set model-00001-of-0000N.safetensors, by N.

    Raises CheckpointError if the directory cannot be listed.
    """
    try:
        names = os.listdir(directory)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error.strerror}") from None
    matches = [re.fullmatch(r"model-([0-9]{5})-of-([0-9]{5})\.safetensors", name) for name in names]
    return Counter(int(match[2]) for match in matches if match and 1 <= int(match[1]) <= int(match[2]))


def _other_sets(directory: Path, loaded: str, others: Sequence[str]) -> tuple[str, ...]:
    """A warning if the directory holds complete sets of weights besides the one that is loaded."""
    if not others:
        return ()
    named = " and ".join(others)
    return (f"{directory} holds {loaded}, which is loaded, and {named}: delete what is not meant",)


def _set_name(total: int) -> str:
    return f"model-*-of-{total:05}.safetensors"


def _numbered_files(directory: Path, sets: "Counter[int]") -> list[str]:
    """The names of the largest complete set; if none is complete, of the largest.

    Raises CheckpointError if too many of them are missing.
    """
    total = max((total for total in sets if sets[total] == total), default=max(sets, default=0))
    if total - sets[total] > 100:
        raise CheckpointError(f"{directory} has {sets[total]} of {total} files {_set_name(total)}")
    return [f"model-{number:05}-of-{total:05}.safetensors" for number in range(1, total + 1)]


def _files_of_index(index_path: Path) -> dict[str, set[str] | None]:
    """The tensors that the index places in each file."""
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: weight_map must be an object that names each tensor's file")
    names_by_file: dict[str, set[str] | None] = {}
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not _is_file_name(file_name):
            raise CheckpointError(
                f"{index_path}: weight_map puts {quoted(name)} into {quoted(file_name)}; "
                "a file of the same directory is expected"
            )
        names = names_by_file.setdefault(file_name, set())
        assert names is not None
        names.add(name)
    return names_by_file


def _is_file_name(name: str) -> bool:
    """Whether this names a file of a directory, and drives no terminal."""
    return name not in ("", "..") and Path(name).name == name and name.isprintable() and len(name) <= 255


def _read_files(directory: Path, names_by_file: "dict[str, set[str] | None]") -> TensorFiles:
    """names_by_file: the tensors that an index places in each file; None: there is no index."""
    paths: list[Path] = []
    entries: dict[str, TensorEntry] = {}
    problems: list[str] = []
    lost: set[str] = set()
    for file_name, names in sorted(names_by_file.items()):
        path = directory / file_name
        try:
            found = _read_header(path)
            entries |= found  # also what an index leaves out, as in transformers
            paths.append(path)
        except CheckpointError as error:
            problems.append(str(error) if names is None else f"{error} ({len(names)} tensors)")
            lost |= names or set()
    return TensorFiles(tuple(paths), entries, tuple(problems), frozenset(lost))


def _read_header(path: Path) -> dict[str, TensorEntry]:
    if not is_there(path):
        raise CheckpointError(f"{path} is missing")
    with open(open_regular(path), "rb") as file:
        try:
            size = os.fstat(file.fileno()).st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path} is no safetensors file, or is truncated ({size} bytes)")
            text = file.read(header_bytes)
        except OSError as error:
            raise CheckpointError(f"{path} has an unreadable header: {error.strerror}") from None
    try:
        header = parse_json(path, text)
    except CheckpointError as error:
        raise CheckpointError(f"{path} has an unreadable header: {str(error).removeprefix(f'{path}: ')}") from None
    data_start = 8 + header_bytes
    entries = {
        name: _parse_entry(path, name, fields, data_start, size)
        for name, fields in header.items()
        if name != "__metadata__"
    }
    _check_layout(path, list(entries.values()), data_start, size)
    return entries


def _parse_entry(path: Path, name: str, fields: object, data_start: int, file_size: int) -> TensorEntry:
    """One tensor's entry in a header, checked against the file.

    data_start: the byte that offsets are relative to.
    """
    if not name.isprintable():  # it would reach a terminal
        raise CheckpointError(f"{path}: the header has a damaged name: {name!a:.100}")
    match fields:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
            all(type(length) is int and 0 <= length < _MAX_LENGTH for length in shape)
            and 0 <= begin <= end < _MAX_LENGTH
            and len(shape) <= 8
            and dtype.isprintable()
            and len(dtype) <= 32
        ):
            entry = TensorEntry(path, dtype, tuple(shape), data_start + begin, end - begin)
        case _:
            raise CheckpointError(f"{path}: the header entry of {name:.100} is damaged: {fields!a:.200}")
    if data_start + end > file_size:
        raise CheckpointError(
            f"{path} is truncated: {name:.100} ends at byte {data_start + end}, the file has {file_size}"
        )
    if entry.dtype in STORED_DTYPES and entry.nbytes != prod(entry.shape) * STORED_DTYPES[entry.dtype].itemsize:
        raise CheckpointError(
            f"{path}: {name:.100} has {entry.nbytes} bytes, which does not fit {entry.dtype} {list(entry.shape)}"
        )
    return entry


def _check_layout(path: Path, entries: Sequence[TensorEntry], data_start: int, file_size: int) -> None:
    """Tensors must fill the file, one after the other: else one would be read as a part of another."""
    end = data_start
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != end:
            raise CheckpointError(
                f"{path} has a damaged header: a tensor begins at byte {entry.offset}, the one before ends at {end}"
            )
        end += entry.nbytes
    if end != file_size:
        raise CheckpointError(f"{path} has {file_size - end} bytes behind its last tensor; download the file again")

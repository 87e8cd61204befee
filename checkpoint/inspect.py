"""Reports what a checkpoint directory holds, what serving it costs, and every problem in it.

Reads headers and JSON files only, no weights, so it is fast even for 800 GB.
"""

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from checkpoint.config import ModelConfig, read_config
from checkpoint.errors import CheckpointError
from checkpoint.layout import count_parameters, tensor_specs
from checkpoint.read_file import TEMPLATE_FILES, is_there, read_json
from checkpoint.tensor_files import TensorFiles, read_tensor_files
from checkpoint.tensors import as_stored, compare
from checkpoint.tokenizer import Tokenizer

NOT_SERVED = "not served"
"""Role of tensors that the text model does not use, such as the vision tower's."""
UNKNOWN_ROLE = "unknown"
"""Role of all tensors if the config cannot be read."""


@dataclass(frozen=True)
class Report:
    """What a checkpoint directory holds.

    Fields that depend on the config are None if it cannot be read.

    active_parameters: those that one token uses, including embedding and output head.
    bytes_by_role: stored size of the tensors, by Role value, NOT_SERVED or UNKNOWN_ROLE.
    dtypes: the stored types, by their safetensors names.
    kv_bytes_per_token: KV cache of one token in all global layers, in the model's dtype.
    kv_bytes_per_token_in_chunk: the same in all chunked layers; they keep at most
    attention_chunk_size tokens.
    problems: one line each; empty if the checkpoint can be served, its chat template aside.
    warnings: what is odd in it, one line each, but does not keep it from being served.
    """

    directory: str
    config: ModelConfig | None
    total_parameters: int | None
    active_parameters: int | None
    bytes_by_role: dict[str, int]
    dtypes: tuple[str, ...]
    num_files: int
    kv_bytes_per_token: int | None
    kv_bytes_per_token_in_chunk: int | None
    has_tokenizer: bool
    has_chat_template: bool
    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> str:
        """The report as a JSON object with the names of these fields."""
        return json.dumps(asdict(self), indent=2)


def inspect_checkpoint(directory: Path | str) -> Report:
    """Inspect a checkpoint directory.

    Whatever is missing, unreadable or inconsistent is listed in `problems`.

    Raises CheckpointError only if the directory does not exist.
    """
    directory = Path(directory)
    if not os.path.isdir(directory):
        raise CheckpointError(f"checkpoint {directory} is no directory")
    problems: list[str] = []
    config = None
    try:
        config = read_config(directory)
    except CheckpointError as error:
        problems.append(str(error))
    files = read_tensor_files(directory)
    try:
        config = None if config is None else as_stored(config, files)
    except CheckpointError as error:
        config = None
        problems.append(str(error))
    problems += files.problems if config is None else compare(config, files)
    tokenizer_problems, warnings = _check_tokenizer(directory, config)
    problems += tokenizer_problems

    total = active = kv_global = kv_chunked = None
    if config is not None:
        total, active = count_parameters(config)
        kv_global, kv_chunked = _kv_bytes_per_token(config)
    return Report(
        directory=str(directory),
        config=config,
        total_parameters=total,
        active_parameters=active,
        bytes_by_role=_bytes_by_role(files, config),
        dtypes=tuple(sorted({entry.dtype for entry in files.entries.values()})),
        num_files=len(files.paths),
        kv_bytes_per_token=kv_global,
        kv_bytes_per_token_in_chunk=kv_chunked,
        has_tokenizer=is_there(directory / "tokenizer.json"),
        has_chat_template=_has_chat_template(directory),
        problems=tuple(problems),
        warnings=(*(config.warnings if config else ()), *files.warnings, *warnings),
    )


def _bytes_by_role(files: TensorFiles, config: ModelConfig | None) -> dict[str, int]:
    specs = {} if config is None else tensor_specs(config)
    other = UNKNOWN_ROLE if config is None else NOT_SERVED
    nbytes: Counter[str] = Counter()
    for name, entry in files.entries.items():
        nbytes[specs[name].role.value if name in specs else other] += entry.nbytes
    return dict(nbytes.most_common())


def _kv_bytes_per_token(config: ModelConfig) -> tuple[int, int]:
    """(global layers, chunked layers): KV cache bytes of one token in each kind."""
    value_bytes: int = getattr(torch, config.dtype).itemsize
    both = config.kv_bytes(1, value_bytes)
    chunk = config.attention_chunk_size
    global_only = config.kv_bytes(chunk + 1, value_bytes) - config.kv_bytes(chunk, value_bytes)
    return global_only, both - global_only


def _check_tokenizer(directory: Path, config: ModelConfig | None) -> tuple[list[str], list[str]]:
    """(problems, warnings): a tokenizer that cannot be opened; ids that only the model or only the tokenizer has."""
    path = directory / "tokenizer.json"
    if not is_there(path):
        return [f"{path} is missing, so text cannot become tokens"], []
    try:
        tokenizer = Tokenizer.open(directory)
    except CheckpointError as error:
        return [str(error)], []
    if config is None:
        return [], []
    warnings = []
    if tokenizer.vocab_size > config.vocab_size:
        highest = tokenizer.vocab_size - 1
        warnings.append(f"{path} has token ids up to {highest}; the config's vocab_size is {config.vocab_size}")
    ends = {"bos_token_id": (config.bos_token_id,), "eos_token_id": config.eos_token_ids}
    for field, token_ids in ends.items():
        warnings += [
            f"{field} is {token_id}; {path} has no such token"
            for token_id in token_ids
            if token_id is not None and not tokenizer.token_bytes(token_id)
        ]
    return [], warnings


def _has_chat_template(directory: Path) -> bool:
    if any(is_there(directory / name) for name in TEMPLATE_FILES):
        return True
    for name in ("tokenizer_config.json", "chat_template.json"):
        try:
            if read_json(directory / name).get("chat_template"):
                return True
        except CheckpointError:
            continue
    return False

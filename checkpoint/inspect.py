"""Says what a checkpoint directory holds, what serving it costs, and everything that is wrong with it.

Reads headers and JSON files only, no weights, so it takes a moment even for 800 GB.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoint.config import ModelConfig, read_config, read_json
from checkpoint.errors import CheckpointError
from checkpoint.layout import count_parameters, tensor_specs
from checkpoint.tensors import TensorFiles, read_tensor_files

NOT_SERVED = "not served"
"""The role of tensors that the text model has no use for, such as the vision tower's."""
UNKNOWN_ROLE = "unknown"
"""The role of all tensors where the config cannot be read."""


@dataclass(frozen=True)
class Report:
    """What a checkpoint directory holds. What follows from the config is None where that cannot be read.

    active_parameters: those that one token uses, embedding and output head included.
    bytes_by_role: size of the tensors as stored, by the value of their Role, NOT_SERVED or UNKNOWN_ROLE.
    dtypes: the stored ones, by the names that safetensors gives them.
    kv_bytes_per_token: what every token of a sequence adds to the KV cache of all global layers, in the model's dtype.
    kv_bytes_per_token_in_chunk: what it adds to that of all chunked layers, until attention_chunk_size is reached.
    problems: one line each, empty if the checkpoint can be served.
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

    def to_json(self) -> str:
        """The report as a JSON object with the names of these fields."""
        return json.dumps(asdict(self), indent=2)


def inspect_checkpoint(directory: Path | str) -> Report:
    """Look at a checkpoint directory; whatever is missing, unreadable or inconsistent in it is listed in `problems`.

    Raises CheckpointError only where there is no such directory.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"checkpoint {directory} is no directory")
    problems: list[str] = []
    config = None
    try:
        config = read_config(directory)
    except CheckpointError as error:
        problems.append(str(error))
    files = read_tensor_files(directory)
    problems += files.problems if config is None else files.compare(config)
    problems += _tokenizer_problems(directory, config)

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
        has_tokenizer=(directory / "tokenizer.json").exists(),
        has_chat_template=_has_chat_template(directory),
        problems=tuple(problems),
    )


def _bytes_by_role(files: TensorFiles, config: ModelConfig | None) -> dict[str, int]:
    specs = {} if config is None else tensor_specs(config)
    other = UNKNOWN_ROLE if config is None else NOT_SERVED
    nbytes: Counter[str] = Counter()
    for name, entry in files.entries.items():
        nbytes[specs[name].role.value if name in specs else other] += entry.nbytes
    return dict(nbytes.most_common())


def _kv_bytes_per_token(config: ModelConfig) -> tuple[int, int]:
    """(global layers, chunked layers): the difference that one token makes to each."""
    value_bytes: int = getattr(torch, config.dtype).itemsize
    both = config.kv_bytes(1, value_bytes)
    chunk = config.attention_chunk_size
    global_only = config.kv_bytes(chunk + 1, value_bytes) - config.kv_bytes(chunk, value_bytes)
    return global_only, both - global_only


def _tokenizer_problems(directory: Path, config: ModelConfig | None) -> list[str]:
    """What keeps text from becoming tokens that the model has, or an answer from ending."""
    path = directory / "tokenizer.json"
    if not path.exists():
        return [f"{path} is missing, so text cannot become tokens"]
    try:
        ids = _token_ids(read_json(path))
        if (directory / "tokenizer_config.json").exists():
            read_json(directory / "tokenizer_config.json")
    except CheckpointError as error:
        return [str(error)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return [f"{path} is no tokenizer: {error!r}"]
    if config is None:
        return []
    problems = []
    if max(ids) >= config.vocab_size:
        problems.append(f"{path} has token ids up to {max(ids)}; the config's vocab_size is {config.vocab_size}")
    ends = {"bos_token_id": (config.bos_token_id,), "eos_token_id": config.eos_token_ids}
    for field, token_ids in ends.items():
        problems += [
            f"{field} is {token_id}; {path} has no such token"
            for token_id in token_ids
            if token_id is not None and token_id not in ids
        ]
    return problems


def _token_ids(tokenizer: dict[str, Any]) -> set[int]:
    added = {int(token["id"]) for token in tokenizer.get("added_tokens", [])}
    ids = added | {int(token_id) for token_id in tokenizer["model"]["vocab"].values()}
    if not ids:
        raise ValueError("it has no tokens")
    return ids


def _has_chat_template(directory: Path) -> bool:
    if (directory / "chat_template.jinja").exists():
        return True
    for name in ("tokenizer_config.json", "chat_template.json"):
        try:
            if read_json(directory / name).get("chat_template"):
                return True
        except CheckpointError:
            continue
    return False

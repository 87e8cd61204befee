"""Reads tensors, or ranges of their rows, from a checkpoint's safetensors files.

Files are not memory-mapped but read with pread, at the offsets in their headers. A process wants
only some rows of a tensor (one Maverick expert tensor has 21.5 GB), and `bytes_read` counts
exactly what was read. Only JSON headers are interpreted, so nothing in a checkpoint is executed.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from checkpoint.config import ModelConfig, read_config
from checkpoint.errors import CheckpointError, listed
from checkpoint.layout import TensorNames, tensor_specs
from checkpoint.naming import Naming
from checkpoint.tensor_files import STORED_DTYPES, TensorFiles, read_tensor_files


class Checkpoint:
    """An open Llama 4 checkpoint directory: its config, and where each tensor is stored.

    Weights are read on demand.

    warnings: what is odd in it, one line each, but does not keep it from being served.
    """

    def __init__(self, directory: Path, config: ModelConfig, files: TensorFiles) -> None:
        self.directory = directory
        self.config = config
        self.entries = files.entries
        self.names = TensorNames(config)
        self.warnings = (*config.warnings, *files.warnings)
        self.bytes_read = 0
        """Bytes of tensor data read through this object so far."""

    @classmethod
    def open(cls, directory: Path | str) -> "Checkpoint":
        """Read config and headers, and check that every tensor exists with the right shape.

        Raises CheckpointError, which lists what is missing, truncated or inconsistent.
        """
        directory = Path(directory)
        if not os.path.isdir(directory):
            raise CheckpointError(f"checkpoint {directory} is no directory")
        files = read_tensor_files(directory)
        config = as_stored(read_config(directory), files)
        problems = compare(config, files)
        if problems:
            more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
            raise CheckpointError(f"checkpoint {directory} cannot be served:{listed(problems[:10] + more)}")
        return cls(directory, config, files)

    def expert_bytes(self, layer: int) -> int:
        """Stored bytes of one routed expert of a layer."""
        total = 0
        for name in self.names.expert(layer, 0):
            entry = self.entries[name]
            total += entry.nbytes // (entry.shape[0] if self.config.naming.fused_experts else 1)
        return total

    def read_expert(
        self, layer: int, expert: int, dtype: torch.dtype, on_bytes: Callable[[int], None] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(gate above up [2 F, D], down [D, F]) of one routed expert: F its width, D the model's.

        They may be views of other layouts. Arguments and errors are those of `read_rows`.
        """
        names = self.names.expert(layer, expert)
        if self.config.naming.fused_experts:
            gate_up_DF2, down_FD = (self.read_rows(name, expert, expert + 1, dtype, on_bytes)[0] for name in names)
            return gate_up_DF2.t(), down_FD.t()
        gate_FD, up_FD, down_DF = (
            self.read_rows(name, 0, self.entries[name].shape[0], dtype, on_bytes) for name in names
        )
        return torch.cat([gate_FD, up_FD]), down_DF

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


def as_stored(config: ModelConfig, files: TensorFiles) -> ModelConfig:
    """The config with what only the files tell: how their tensors are named, and their dtype if it names none.

    Raises CheckpointError if they cannot belong together, before a list of what is missing eats the memory.
    """
    naming = Naming.found_in(files.entries, config.naming)
    of_experts = 3 * len(config.moe_layers) * config.num_experts
    if not naming.fused_experts and of_experts > 2 * len(files.entries):
        raise CheckpointError(
            f"the config calls for {of_experts} tensors of experts; the files have {len(files.entries)} tensors in all"
        )
    return replace(config, naming=naming, dtype=config.dtype or files.dtype or "bfloat16")


def compare(config: ModelConfig, files: TensorFiles) -> list[str]:
    """One line for each tensor or file that is missing, damaged, or not as in `config`."""
    found = list(files.problems)
    if not files.entries and found:
        return found  # no file is readable: do not list every tensor as missing, too
    for name, spec in tensor_specs(config).items():
        entry = files.entries.get(name)
        if entry is None:
            if name not in files.lost:
                found.append(f"{name} is missing")
        elif entry.shape != spec.shape:
            found.append(f"{name} has shape {list(entry.shape)}; the config calls for {list(spec.shape)}")
        elif entry.dtype not in STORED_DTYPES:
            found.append(
                f"{name} has dtype {entry.dtype}; supported are {', '.join(STORED_DTYPES)}: convert the checkpoint, "
                "for instance by transformers' save_pretrained in bfloat16"
            )
    return found

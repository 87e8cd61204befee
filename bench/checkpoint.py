"""The benchmark's model: Maverick's shape scaled down to 862 M parameters, with random weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from checkpoint.config import ModelConfig, read_config
from checkpoint.random_model import write_random_checkpoint
from checkpoint.read_file import read_json
from checkpoint.shape import SHAPES, ModelShape, write_json

BENCH_SHAPE: ModelShape = replace(
    SHAPES["maverick"],
    vocab_size=32000,
    hidden_size=512,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=1024,
    intermediate_size_mlp=2048,
    max_position_embeddings=131072,
)


def ensure_checkpoint(
    directory: Path, shape: ModelShape = BENCH_SHAPE, on_progress: Callable[[int, int], None] | None = None
) -> ModelConfig:
    """The config of the checkpoint in `directory`, which is written first unless it is there. Raises DroverError.

    No token ends a text: random weights would now and then choose the end token, and streams of unequal length measure
    something else.
    """
    if not (directory / "config.json").exists():
        write_random_checkpoint(directory, shape, on_progress=on_progress)
    if read_config(directory).eos_token_ids:
        for name in ("generation_config.json", "config.json"):
            write_json(directory / name, read_json(directory / name) | {"eos_token_id": None})
    return read_config(directory)

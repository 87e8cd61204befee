"""The hyperparameters of a Llama 4 model, and the config.json and weight index written from them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkpoint.config import RopeScaling
from checkpoint.make_tokenizer import TokenizerIds
from checkpoint.tensor_files import INDEX_FILE, SINGLE_FILE


@dataclass(frozen=True)
class ModelShape:
    """The hyperparameters in a Llama 4 config.json, under the same names.

    The defaults are Maverick's.

    Only rope_scaling differs: config.json has it as part of `rope_parameters`.
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
    # Maverick's layers in 55 MB of bf16. Chunks are short, so that a page of text spans several.
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


def config_json(shape: ModelShape, dtype: str, architecture: str, ids: TokenizerIds | None) -> dict[str, Any]:
    """The contents of config.json, as transformers 5 writes it.

    dtype: of the weights, as torch names it. architecture: one of checkpoint/config.py's
    ARCHITECTURES.
    ids: None omits the tokenizer's fields.
    """
    fields = asdict(shape)
    scaling, theta = fields.pop("rope_scaling"), fields.pop("rope_theta")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if scaling is not None:
        original = scaling.pop("original_positions")
        rope |= {"rope_type": "llama3", "original_max_position_embeddings": original, **scaling}
    text = {"model_type": "llama4_text", **fields, "rope_parameters": rope, "dtype": dtype}
    if ids is not None:
        text |= token_id_fields(ids)
    if architecture == "Llama4ForCausalLM":
        return {"architectures": [architecture], **text}
    # The outer flag repeats the inner one because transformers looks at either, depending on the
    # class.
    outer = {"tie_word_embeddings": shape.tie_word_embeddings, "dtype": dtype}
    return {"architectures": [architecture], "model_type": "llama4", "text_config": text, **outer}


def token_id_fields(ids: TokenizerIds) -> dict[str, Any]:
    """The tokenizer's fields, which config.json and generation_config.json share."""
    return {
        "bos_token_id": ids.bos_token_id,
        "eos_token_id": list(ids.eos_token_ids),
        "pad_token_id": ids.pad_token_id,
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write an indented JSON file. Raises OSError."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_index(directory: Path, files: Sequence[Sequence[str]], total_bytes: int) -> list[str]:
    """Choose the weight files' names. With more than one file, write their index, too.

    files: for each file the names of its tensors.
    """
    if len(files) == 1:
        return [SINGLE_FILE]
    file_names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    weight_map = {name: file for file, names in zip(file_names, files, strict=True) for name in names}
    write_json(directory / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    return file_names


def split_into_files(tensor_bytes: Mapping[str, int], max_file_bytes: int) -> list[list[str]]:
    """Distribute tensors, in order, over files of at most max_file_bytes.

    A larger tensor gets a file of its own.
    """
    files: list[list[str]] = [[]]
    file_bytes = 0
    for name, nbytes in tensor_bytes.items():
        if files[-1] and file_bytes + nbytes > max_file_bytes:
            files.append([])
            file_bytes = 0
        files[-1].append(name)
        file_bytes += nbytes
    return files

"""Converts a bf16 Llama 4 checkpoint to GGUF for llama.cpp, bit by bit: nothing is rounded. Needs gguf and numpy.

    python -m bench.peers.to_gguf CHECKPOINT OUT.gguf

Query and key rows stay as they are: Llama 4's rotary pairs are interleaved in both formats. No vocabulary is written,
because requests are token ids.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

BF16 = gguf.GGMLQuantizationType.BF16
Array = np.ndarray[Any, Any]


class Weights:
    """A checkpoint's tensors as the 16-bit patterns of their values."""

    def __init__(self, directory: Path) -> None:
        self._tensors: dict[str, Array] = {}
        for file in sorted(directory.glob("*.safetensors")):
            data = np.memmap(file, dtype=np.uint8, mode="r")
            begin = 8 + int.from_bytes(data[:8].tobytes(), "little")
            header = json.loads(data[8:begin].tobytes())
            header.pop("__metadata__", None)
            for name, entry in header.items():
                if entry["dtype"] != "BF16":
                    sys.exit(f"{file}: {name} is {entry['dtype']}; only BF16 is converted")
                first, end = (begin + offset for offset in entry["data_offsets"])
                self._tensors[name] = data[first:end].view(np.uint16).reshape(entry["shape"])

    def get(self, name: str) -> Array:
        return self._tensors[name]


def add_config(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """The hyperparameters under llama.cpp's names."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size_mlp"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    for add_length in (writer.add_rope_dimension_count, writer.add_key_length, writer.add_value_length):
        add_length(config["head_dim"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_interleave_moe_layer_step(config["interleave_moe_layer_step"])
    writer.add_tokenizer_model("no_vocab")


def add_weights(writer: gguf.GGUFWriter, config: dict[str, Any], weights: Weights) -> None:
    """Matrices in bf16; norms and gates in float32, as llama.cpp wants them."""

    def bf16(name: str, bits: Array) -> None:
        writer.add_tensor(name, np.ascontiguousarray(bits).view(np.uint8), raw_dtype=BF16)

    def fp32(name: str, bits: Array) -> None:
        writer.add_tensor(name, (bits.astype(np.uint32) << 16).view(np.float32))

    bf16("token_embd.weight", weights.get("model.embed_tokens.weight"))
    fp32("output_norm.weight", weights.get("model.norm.weight"))
    bf16("output.weight", weights.get("lm_head.weight"))
    width, step = config["intermediate_size"], config["interleave_moe_layer_step"]
    for layer in range(config["num_hidden_layers"]):
        source, target = f"model.layers.{layer}.", f"blk.{layer}."
        fp32(target + "attn_norm.weight", weights.get(source + "input_layernorm.weight"))
        fp32(target + "ffn_norm.weight", weights.get(source + "post_attention_layernorm.weight"))
        for short, long in (("q", "q"), ("k", "k"), ("v", "v"), ("output", "o")):
            bf16(f"{target}attn_{short}.weight", weights.get(f"{source}self_attn.{long}_proj.weight"))
        mlp = source + "feed_forward."
        if layer % step == step - 1:
            fp32(target + "ffn_gate_inp.weight", weights.get(mlp + "router.weight"))
            gate_up = weights.get(mlp + "experts.gate_up_proj")  # [experts, hidden, 2 * width], gate first
            bf16(target + "ffn_gate_exps.weight", gate_up[:, :, :width].transpose(0, 2, 1))
            bf16(target + "ffn_up_exps.weight", gate_up[:, :, width:].transpose(0, 2, 1))
            bf16(target + "ffn_down_exps.weight", weights.get(mlp + "experts.down_proj").transpose(0, 2, 1))
            for part in ("gate", "up", "down"):
                bf16(f"{target}ffn_{part}_shexp.weight", weights.get(f"{mlp}shared_expert.{part}_proj.weight"))
        else:
            for part in ("gate", "up", "down"):
                bf16(f"{target}ffn_{part}.weight", weights.get(f"{mlp}{part}_proj.weight"))


def main(checkpoint: Path, out: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    partial = out.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama4", use_temp_file=True)
    add_config(writer, config)
    add_weights(writer, config, Weights(checkpoint))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

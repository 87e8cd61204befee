"""Tiny random Llama 4 checkpoints made with transformers' own classes, and what transformers computes with them."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, Llama4ForCausalLM, Llama4TextConfig

from checkpoint.make_tokenizer import write_byte_tokenizer

VOCAB_SIZE = 400  # of a checkpoint that is served

SCOUT_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}
LLAMA31_ROPE = {**SCOUT_ROPE, "factor": 8.0, "high_freq_factor": 4.0}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

_BASE: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "intermediate_size_mlp": 40,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "attention_chunk_size": 16,
    "floor_scale": 8,
    "attn_scale": 0.1,
    "attn_temperature_tuning": True,
    "max_position_embeddings": 512,
    "use_qk_norm": True,
    "rope_parameters": PLAIN_ROPE,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

TINY_MODELS: dict[str, dict[str, Any]] = {
    "scout": {"num_local_experts": 16, "rope_parameters": SCOUT_ROPE},
    "scout-blended-rope": {"num_local_experts": 16, "rope_parameters": LLAMA31_ROPE},
    "scout-one-expert": {"num_local_experts": 1},
    "scout-top-2": {"num_local_experts": 16, "num_experts_per_tok": 2, "rope_parameters": SCOUT_ROPE},
    "scout-tied": {"tie_word_embeddings": True, "rope_parameters": SCOUT_ROPE},
    "maverick": {"num_local_experts": 128, "interleave_moe_layer_step": 2, "use_qk_norm": False},
    "maverick-qk-norm": {"num_local_experts": 128, "interleave_moe_layer_step": 2},
    "maverick-4-experts": {"interleave_moe_layer_step": 2, "use_qk_norm": False, "num_hidden_layers": 8},
    "maverick-top-2": {
        "num_local_experts": 128,
        "num_experts_per_tok": 2,
        "interleave_moe_layer_step": 2,
        "use_qk_norm": False,
    },
    "untuned-odd-chunk": {"attn_temperature_tuning": False, "attention_chunk_size": 13, "num_attention_heads": 6},
}


@dataclass(frozen=True)
class Reference:
    """transformers' model in fp32 and the directory that it was saved to."""

    model: Llama4ForCausalLM
    directory: Path

    @torch.inference_mode()
    def prefill_logits(self, token_ids: list[int]) -> torch.Tensor:
        """[T, V], from one pass over all tokens."""
        return self.model(torch.tensor([token_ids])).logits[0]

    @torch.inference_mode()
    def greedy(self, token_ids: list[int], count: int) -> tuple[list[int], torch.Tensor]:
        """`count` tokens chosen one by one with a cache, and the logits [count, V] that each was chosen from."""
        cached = DynamicCache(config=self.model.config)
        inputs, chosen, logits = torch.tensor([token_ids]), [], []
        for _ in range(count):
            logits.append(self.model(inputs, past_key_values=cached, use_cache=True).logits[0, -1])
            chosen.append(int(logits[-1].argmax()))
            inputs = torch.tensor([[chosen[-1]]])
        return chosen, torch.stack(logits)


def make_reference(
    directory: Path, name: str, *, seed: int = 0, std: float = 0.25, gate_std: float = 0.25, **overrides: Any
) -> Reference:
    """Save the tiny model `name` into `directory`. Weights are drawn wide: small ones would hide mistakes."""
    config = Llama4TextConfig(**{**_BASE, **TINY_MODELS[name], **overrides})
    config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(seed)
    model = Llama4ForCausalLM(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
        elif "router" in parameter_name:
            parameter.data.normal_(0, gate_std, generator=generator)
        else:
            parameter.data.normal_(0, std, generator=generator)
    model.tie_weights()
    model.save_pretrained(directory)
    return Reference(model, directory)


@cache
def prompt(length: int, vocab_size: int = 199, seed: int = 7) -> tuple[int, ...]:
    """Random token ids that avoid the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, vocab_size, (length,), generator=generator).tolist())


def make_served_reference(directory: Path, name: str, **changes: Any) -> Reference:
    """A tiny reference checkpoint with a tokenizer and a chat template, as a frontend needs. changes: of its config."""
    # No end token: random text would run into it, and tests want to say how long answers are.
    reference = make_reference(directory, name, vocab_size=VOCAB_SIZE, eos_token_id=None, **changes)
    write_byte_tokenizer(directory, VOCAB_SIZE)
    return reference

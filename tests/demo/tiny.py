"""A tiny Llama 4, its tokenizer, and texts: what the tests of the demo room have in common."""

from dataclasses import replace
from pathlib import Path

import torch
from rich.progress import Progress
from tokenizers import Tokenizer

from checkpoint.make_tokenizer import write_byte_tokenizer
from checkpoint.shape import ModelShape
from demo.model import Llama4

# Two dense layers, two with experts; the fourth layer is NoPE and sees everything, the others chunks of 16.
TINY = ModelShape(
    vocab_size=512,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=12,
    intermediate_size_mlp=24,
    num_local_experts=8,
    attention_chunk_size=16,
    max_position_embeddings=2048,
)
ROOMY = replace(TINY, attention_chunk_size=256)  # for texts of any length below a chunk's
NO_PROGRESS = Progress(disable=True)


def drawn_model(shape: ModelShape = TINY, seed: int = 0) -> Llama4:
    """A model with wide weights, the output head's and the norms' too: small ones would hide mistakes."""
    model = Llama4(shape).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.uniform_(0.5, 1.5, generator=generator)
            else:
                weight.normal_(0, 0.25, generator=generator)
    return model


def byte_tokenizer(folder: Path) -> Tokenizer:
    """A tokenizer of TINY's vocabulary, whose files are left in `folder`."""
    write_byte_tokenizer(folder, TINY.vocab_size)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def token_ids(windows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids [windows, length]."""
    return torch.randint(TINY.vocab_size, (windows, length), generator=torch.Generator().manual_seed(seed))

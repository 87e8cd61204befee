"""The shipped model's shape, and its dense twin's."""

from dataclasses import replace

from checkpoint.shape import ModelShape
from demo.data import VOCAB_SIZE

# Maverick in 23 MB of bf16: 128 routed experts, top-1, and a shared one in every second layer; every fourth layer
# without rotation and without chunks, the others in chunks of half a training window.
SHIPPED = ModelShape(
    vocab_size=VOCAB_SIZE,
    hidden_size=128,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=48,
    intermediate_size_mlp=256,
    num_local_experts=128,
    attention_chunk_size=256,
    max_position_embeddings=2048,
)

# What a token meets in the shipped model, without the choice: where it has a shared and a routed expert, one MLP
# as wide as both.
DENSE_TWIN = replace(SHIPPED, num_local_experts=0)

"""The bandwidth floor: no step can take less time than its bytes take to come from memory.

What a step reads: every weight but the routed experts' and the embedding's once, the routed experts that any stream
chose, one embedding row and the keys and values of each stream. Nothing is assumed to stay in the cache.
"""

from dataclasses import dataclass

from checkpoint.config import ModelConfig
from checkpoint.layout import Role, tensor_specs


@dataclass(frozen=True)
class ModelBytes:
    """What a step reads of a model. always: whatever the step. expert: of one routed expert of one layer."""

    always: int
    expert: int
    moe_layers: int
    embedding_row: int


def model_bytes(config: ModelConfig, bytes_per_value: int) -> ModelBytes:
    """The sizes, from the checkpoint's config."""
    always = routed = 0
    for spec in tensor_specs(config).values():
        if spec.role is Role.ROUTED_EXPERTS:
            routed += spec.parameters
        elif spec.role is not Role.EMBEDDING or config.tie_word_embeddings:
            always += spec.parameters
    layers = len(config.moe_layers)
    expert = routed // (layers * config.num_experts) if layers else 0
    return ModelBytes(always * bytes_per_value, expert * bytes_per_value, layers, config.hidden_size * bytes_per_value)


def uniform_experts_hit(num_experts: int, experts_per_token: int, streams: int) -> float:
    """Distinct experts that a layer's tokens hit if each chooses at random.

    Each expert is missed by one token with probability 1 - k / E, so E * (1 - (1 - k / E) ** streams).
    With 128 experts, top-1 and 32 streams: 128 * (1 - (127 / 128) ** 32) = 28.4.
    """
    return num_experts * (1 - (1 - experts_per_token / num_experts) ** streams)


def step_bytes(model: ModelBytes, streams: int, experts_hit: float, kv_bytes_per_stream: float) -> float:
    """Bytes that one decoding step of `streams` streams reads.

    With 100 bytes always, 4 MoE layers of experts of 10 bytes, 3 hit in each, and 2 streams with 5 bytes of keys and
    values and embedding rows of 1 byte: 100 + 4 * 3 * 10 + 2 * (5 + 1) = 232.
    """
    per_stream = kv_bytes_per_stream + model.embedding_row
    return model.always + model.moe_layers * experts_hit * model.expert + streams * per_stream


def floor_tok_s(streams: int, nbytes: float, bandwidth_bytes_s: float) -> float:
    """Tokens per second at the floor: each step makes one token for each stream.

    232 bytes at 464 bytes/s take half a second: 2 streams make 4 tokens/s.
    """
    return streams / (nbytes / bandwidth_bytes_s)

"""The tensors of a Llama 4 text checkpoint: names, shapes and roles.

Names and layouts are those of Llama4ForCausalLM in transformers (unchanged from version 4 to 5):
linear weights are [out, in], routed experts are fused over experts and stored [experts, in, out],
gate columns before up columns. Converted checkpoints may have unfused experts instead, each with
three linear weights, as llm-compressor writes them.
"""

from collections import Counter
from dataclasses import dataclass
from enum import Enum
from math import prod

from checkpoint.config import ModelConfig


class Role(str, Enum):
    """The role of a tensor.

    Shards hold ROUTED_EXPERTS, each some of them; a router holds all other roles.
    """

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    NORM = "norms"
    DENSE_MLP = "dense MLP"
    GATE = "expert gate"
    SHARED_EXPERT = "shared expert"
    ROUTED_EXPERTS = "routed experts"
    LM_HEAD = "output head"


@dataclass(frozen=True)
class TensorSpec:
    shape: tuple[int, ...]
    role: Role

    @property
    def parameters(self) -> int:
        return prod(self.shape)


class TensorNames:
    """The names of one checkpoint's tensors."""

    def __init__(self, config: ModelConfig) -> None:
        self._naming = config.naming
        self.embedding = f"{self._naming.decoder}embed_tokens.weight"
        self.final_norm = f"{self._naming.decoder}norm.weight"
        self.lm_head = self._naming.lm_head

    def layer(self, layer: int, name: str) -> str:
        return f"{self._naming.decoder}layers.{layer}.{name}"

    def expert(self, layer: int, expert: int) -> tuple[str, ...]:
        """The tensors that hold one expert: its own gate, up and down projections, or the layer's gate_up and down."""
        if self._naming.fused_experts:
            return self.expert_gate_up(layer), self.expert_down(layer)
        of_expert = self.layer(layer, f"feed_forward.experts.{expert}")
        return f"{of_expert}.gate_proj.weight", f"{of_expert}.up_proj.weight", f"{of_expert}.down_proj.weight"

    def expert_gate_up(self, layer: int) -> str:
        """[experts, hidden, 2 * intermediate]: all experts' gate and up projections, no `.weight`."""
        return self.layer(layer, "feed_forward.experts.gate_up_proj")

    def expert_down(self, layer: int) -> str:
        """[experts, intermediate, hidden]: all experts' down projections, no `.weight`."""
        return self.layer(layer, "feed_forward.experts.down_proj")


def tensor_specs(config: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor that the text model must have, by name.

    A tied output head has no tensor of its own.
    """
    names = TensorNames(config)
    hidden, vocab = config.hidden_size, config.vocab_size
    specs = {
        names.embedding: TensorSpec((vocab, hidden), Role.EMBEDDING),
        names.final_norm: TensorSpec((hidden,), Role.NORM),
    }
    if not config.tie_word_embeddings:
        specs[names.lm_head] = TensorSpec((vocab, hidden), Role.LM_HEAD)
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for index, layer in enumerate(config.layers):
        shapes: dict[str, tuple[tuple[int, ...], Role]] = {
            "input_layernorm.weight": ((hidden,), Role.NORM),
            "post_attention_layernorm.weight": ((hidden,), Role.NORM),
            "self_attn.q_proj.weight": ((q_size, hidden), Role.ATTENTION),
            "self_attn.k_proj.weight": ((kv_size, hidden), Role.ATTENTION),
            "self_attn.v_proj.weight": ((kv_size, hidden), Role.ATTENTION),
            "self_attn.o_proj.weight": ((hidden, q_size), Role.ATTENTION),
        }
        if layer.is_moe:
            experts, width = config.num_experts, config.intermediate_size
            shapes["feed_forward.router.weight"] = ((experts, hidden), Role.GATE)
            if config.naming.fused_experts:
                shapes["feed_forward.experts.gate_up_proj"] = ((experts, hidden, 2 * width), Role.ROUTED_EXPERTS)
                shapes["feed_forward.experts.down_proj"] = ((experts, width, hidden), Role.ROUTED_EXPERTS)
            else:
                for expert in range(experts):
                    prefix = f"feed_forward.experts.{expert}"
                    shapes |= _mlp_shapes(prefix, hidden, width, Role.ROUTED_EXPERTS)
            shapes |= _mlp_shapes("feed_forward.shared_expert", hidden, width, Role.SHARED_EXPERT)
        else:
            shapes |= _mlp_shapes("feed_forward", hidden, config.intermediate_size_mlp, Role.DENSE_MLP)
        specs |= {names.layer(index, name): TensorSpec(shape, role) for name, (shape, role) in shapes.items()}
    return specs


def _mlp_shapes(prefix: str, hidden: int, width: int, role: Role) -> dict[str, tuple[tuple[int, ...], Role]]:
    return {
        f"{prefix}.gate_proj.weight": ((width, hidden), role),
        f"{prefix}.up_proj.weight": ((width, hidden), role),
        f"{prefix}.down_proj.weight": ((hidden, width), role),
    }


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """(total, active) parameters.

    Active: those that one token uses, including embedding, head and top-k experts.
    """
    parameters: Counter[Role] = Counter()
    for spec in tensor_specs(config).values():
        parameters[spec.role] += spec.parameters
    routed = parameters[Role.ROUTED_EXPERTS]
    idle = routed - routed // config.num_experts * config.experts_per_token if routed else 0
    return parameters.total(), parameters.total() - idle

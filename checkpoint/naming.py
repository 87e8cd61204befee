"""How a checkpoint names its tensors: the classes of transformers, and their versions, differ."""

from collections.abc import Iterable
from dataclasses import dataclass

_EMBEDDING, _LM_HEAD = "embed_tokens.weight", "lm_head.weight"
_FIRST_OF_UNFUSED = "feed_forward.experts.0.gate_proj.weight"


@dataclass(frozen=True)
class Naming:
    """decoder: what precedes `embed_tokens`, `layers` and `norm`. lm_head: the output head's name.

    fused_experts: a layer's routed experts are two tensors, gate_up_proj and down_proj. Otherwise
    each expert has three.
    """

    decoder: str = "model."
    lm_head: str = _LM_HEAD
    fused_experts: bool = True

    @classmethod
    def found_in(cls, names: Iterable[str], default: "Naming") -> "Naming":
        """The naming of a checkpoint with tensors `names`; `default` where they do not tell."""
        names = list(names)
        decoders = [name.removesuffix(_EMBEDDING) for name in names if name.endswith(_EMBEDDING)]
        heads = [name for name in names if name.endswith(_LM_HEAD)]
        decoder = default.decoder if default.decoder in decoders or len(decoders) != 1 else decoders[0]
        lm_head = default.lm_head if default.lm_head in heads or len(heads) != 1 else heads[0]
        return cls(decoder, lm_head, not any(name.endswith(_FIRST_OF_UNFUSED) for name in names))


ARCHITECTURES = {
    "Llama4ForCausalLM": Naming(),
    "Llama4ForConditionalGeneration": Naming("language_model.model.", "language_model.lm_head.weight"),
}
"""The classes of transformers whose text model is served, and how save_pretrained names its tensors."""

"""Llama 4 for training: whole windows at once, every expert's tokens in one batched product, gradients.

Serving never runs this. Parameters carry the names they have in a Hugging Face checkpoint, so exporting the model is
writing its state_dict. The formulas are Llama 4's (transformers 5.23, `models/llama4`): top-1 routing on the router's
logits, the sigmoid score scales the expert's *input*, interleaved rotary pairs, no rotation and no chunks in every
fourth layer.

Dimensions: N windows, L positions in a window, T = N * L tokens, D model width, H query heads, K key/value heads,
E experts, C tokens in the fullest expert, F expert width, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint.shape import ModelShape


@dataclass(frozen=True)
class Trunk:
    """A forward pass short of the vocabulary: the last hidden states, and what the routers did on the way.

    balance: the mean balancing loss of the MoE layers; experts_NL: the chosen experts, MoE layer by MoE layer.
    """

    hidden_NLD: Tensor
    balance: Tensor
    experts_NL: list[Tensor]


class Llama4(nn.Module):
    """What `ModelShape` describes, with fp32 weights drawn anew. With num_local_experts 0, its dense twin."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        assert shape.num_experts_per_tok == 1, "routing is top-1"
        assert not shape.use_qk_norm, "Maverick has none, and it is not written here"
        assert shape.rope_scaling is None, "Maverick has none, and it is not written here"
        assert not shape.tie_word_embeddings, "Maverick's are not tied"
        self.shape = shape
        self.model = Decoder(shape)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self._draw_weights()

    def forward(self, ids_NL: Tensor) -> Trunk:
        """All but the product with the vocabulary, `lm_head`, which not every caller wants of every token."""
        return self.model(ids_NL)  # type: ignore[no-any-return]

    def _draw_weights(self) -> None:
        """Normal, std 1/sqrt(inputs); what writes into the residual stream is smaller, by 1/sqrt(2 layers)."""
        into_stream = (2 * self.shape.num_hidden_layers) ** -0.5
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                continue
            inputs = weight.shape[-2] if ".experts." in name else weight.shape[-1]
            std = inputs**-0.5 * (into_stream if "o_proj" in name or "down_proj" in name else 1.0)
            nn.init.normal_(weight, std=0.5 if "embed" in name else 0.0 if "lm_head" in name else std)


class Decoder(nn.Module):
    """The layers, and what is before and after them."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList([Layer(shape, index) for index in range(shape.num_hidden_layers)])
        self.norm = RMSNorm(shape)

    def forward(self, ids_NL: Tensor) -> Trunk:
        x_NLD: Tensor = self.embed_tokens(ids_NL)
        rotation = rotary_angles(self.shape, ids_NL.shape[1], ids_NL.device)
        balances: list[Tensor] = []
        chosen: list[Tensor] = []
        for layer in self.layers:
            x_NLD, routing = layer(x_NLD, rotation)
            if routing is not None:
                balances.append(routing[0])
                chosen.append(routing[1])
        balance = torch.stack(balances).mean() if balances else x_NLD.new_zeros(())
        return Trunk(self.norm(x_NLD), balance, chosen)


class Layer(nn.Module):
    def __init__(self, shape: ModelShape, index: int) -> None:
        super().__init__()
        rotary = (index + 1) % shape.no_rope_layer_interval != 0
        routed = shape.num_local_experts > 0 and (index + 1) % shape.interleave_moe_layer_step == 0
        self.input_layernorm = RMSNorm(shape)
        self.self_attn = Attention(shape, rotary)
        self.post_attention_layernorm = RMSNorm(shape)
        dense_width = shape.intermediate_size_mlp
        if shape.num_local_experts == 0 and (index + 1) % shape.interleave_moe_layer_step == 0:
            dense_width = 2 * shape.intermediate_size  # the shared expert and the one routed expert that a token uses
        self.feed_forward = MoE(shape) if routed else GatedMLP(shape.hidden_size, dense_width)

    def forward(self, x_NLD: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The layer's output; a layer with experts adds its balancing loss and each token's expert [N, L]."""
        x_NLD = x_NLD + self.self_attn(self.input_layernorm(x_NLD), rotation)
        h_NLD = self.post_attention_layernorm(x_NLD)
        if isinstance(self.feed_forward, MoE):
            out_NLD, balance, experts_NL = self.feed_forward(h_NLD)
            return x_NLD + out_NLD, (balance, experts_NL)
        return x_NLD + self.feed_forward(h_NLD), None


class RMSNorm(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.hidden_size))
        self.eps = shape.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class GatedMLP(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Experts(nn.Module):
    """All routed experts of a layer, as Hugging Face stores them: input times weight, gate before up."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        experts, hidden, width = shape.num_local_experts, shape.hidden_size, shape.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, hidden, 2 * width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, hidden))

    def forward(self, x_TD: Tensor, expert_T: Tensor) -> Tensor:
        """Row t through expert expert_T[t], as one batched product over [E, C, D]; none is dropped."""
        num_experts = self.gate_up_proj.shape[0]
        count_E = torch.bincount(expert_T, minlength=num_experts)
        capacity = int(count_E.max())
        order_T = torch.argsort(expert_T, stable=True)
        first_E = torch.cumsum(count_E, 0) - count_E
        sorted_T = expert_T[order_T]
        place_T = sorted_T * capacity + torch.arange(len(order_T), device=x_TD.device) - first_E[sorted_T]
        slot_T = torch.empty_like(place_T).scatter_(0, order_T, place_T)  # row t's place in [E * C]
        x_ECD = x_TD.new_zeros(num_experts * capacity, x_TD.shape[1]).index_copy(0, slot_T, x_TD)
        gate_ECF, up_ECF = torch.bmm(x_ECD.view(num_experts, capacity, -1), self.gate_up_proj).chunk(2, -1)
        out_ECD = torch.bmm(F.silu(gate_ECF) * up_ECF, self.down_proj)
        return out_ECD.flatten(0, 1).index_select(0, slot_T)


class MoE(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.router = nn.Linear(shape.hidden_size, shape.num_local_experts, bias=False)
        self.experts = Experts(shape)
        self.shared_expert = GatedMLP(shape.hidden_size, shape.intermediate_size)

    def forward(self, x_NLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The output, the balancing loss, and each token's expert [N, L].

        The balancing loss is Switch Transformer's (Fedus et al. 2021, eq. 4): E times the sum over experts of the
        share of tokens sent times the mean probability; 1 when balanced.
        """
        x_TD = x_NLD.flatten(0, 1)
        logits_TE = self.router(x_TD).float()
        top_T, expert_T = logits_TE.max(-1)
        routed_TD = self.experts(x_TD * torch.sigmoid(top_T).to(x_TD.dtype)[:, None], expert_T)
        num_experts = logits_TE.shape[1]
        share_E = torch.bincount(expert_T, minlength=num_experts) / len(expert_T)
        balance = num_experts * (share_E * logits_TE.softmax(-1).mean(0)).sum()
        out_NLD = self.shared_expert(x_NLD) + routed_TD.view_as(x_NLD)
        return out_NLD, balance, expert_T.view(x_NLD.shape[:2])


class Attention(nn.Module):
    def __init__(self, shape: ModelShape, rotary: bool) -> None:
        super().__init__()
        self.rotary = rotary
        self.chunk = shape.attention_chunk_size
        self.head_dim = shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, shape.num_attention_heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, shape.num_key_value_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, shape.num_key_value_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.num_attention_heads * shape.head_dim, shape.hidden_size, bias=False)

    def forward(self, x_NLD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        windows, length, _ = x_NLD.shape
        q, k, v = (proj(x_NLD).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.rotary:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
            if length > self.chunk:  # a chunk sees itself only: chunks become windows of their own
                assert length % self.chunk == 0, "a training window holds whole chunks"
                q, k, v = (t.reshape(-1, self.chunk, *t.shape[2:]) for t in (q, k, v))
        repeats = q.shape[2] // k.shape[2]
        k, v = (t.repeat_interleave(repeats, 2) for t in (k, v))
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        projected: Tensor = self.o_proj(out.transpose(1, 2).reshape(windows, length, -1))
        return projected


def rotary_angles(shape: ModelShape, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position times frequency, each [L, 1, head_dim / 2]."""
    exponents = torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim
    angles = torch.arange(length, device=device)[:, None] * shape.rope_theta**-exponents
    return angles.cos()[:, None], angles.sin()[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring values are the two parts of a complex number, multiplied by cos + i sin."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), -1).flatten(-2)

"""The parity tests can fail: each semantic of the model, broken on purpose, moves the logits away from transformers'.

Two things that look like semantics are none, and so cannot be broken: QK norm before instead of after the rotation
(a rotation keeps the length that the norm divides by), and top-k of the sigmoid instead of the logits while no two
sigmoids are equal (it is monotone). The second is shown on gates so decided that sigmoids saturate and tie.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import kernels.grouped_mlp
import router.model.heads
import router.model.llama4
import router.model.moe
from checkpoint.config import ModelConfig, read_config
from kernels.cores import Cores
from kernels.kernels import TorchKernels
from router.model.dispatch import Dispatcher, DispatchHandle
from tests.local_model import load_model, prefill_logits
from tests.reference import Reference, make_reference, prompt
from tests.router.model.test_parity import TOLERANCE, relative_error

CPU = torch.device("cpu")
TOKENS = list(prompt(75))
References = Callable[..., Reference]


@pytest.fixture(scope="module")
def reference_of(tmp_path_factory: pytest.TempPathFactory) -> References:
    made: dict[Any, Reference] = {}

    def get(name: str, **options: Any) -> Reference:
        key = (name, *sorted(options.items()))
        if key not in made:
            made[key] = make_reference(tmp_path_factory.mktemp(name), name, **options)
        return made[key]

    return get


def error_of(reference: Reference, **config_changes: Any) -> float:
    # In plain torch, since only that has functions that can be replaced by wrong ones.
    kernels = TorchKernels(CPU, torch.float32, Cores(1, "test"))
    model = load_model(reference.directory, kernels=kernels, **config_changes)
    ours = prefill_logits(model, TOKENS)
    return relative_error(ours, reference.prefill_logits(TOKENS))


def all_layers(config: ModelConfig, **changes: Any) -> dict[str, Any]:
    return {"layers": tuple(replace(layer, **changes) for layer in config.layers)}


CONFIG_MUTATIONS: dict[str, tuple[str, Callable[[ModelConfig], dict[str, Any]]]] = {
    "rope theta": ("maverick", lambda c: {"rope_theta": c.rope_theta * 1.1}),
    "rope scaling left out": ("scout", lambda c: {"rope_scaling": None}),
    "rope scaling factor": (
        "scout-blended-rope",
        lambda c: {"rope_scaling": replace(c.rope_scaling, factor=9.0)},  # type: ignore[type-var]
    ),
    "attention chunk one longer": ("scout", lambda c: {"attention_chunk_size": c.attention_chunk_size + 1}),
    "attention chunk one shorter": ("scout", lambda c: {"attention_chunk_size": c.attention_chunk_size - 1}),
    "no chunks": ("scout", lambda c: all_layers(c, is_chunked=False)),
    "every layer chunked": ("scout", lambda c: all_layers(c, is_chunked=True)),
    "rope on NoPE layers": ("scout", lambda c: all_layers(c, uses_rope=True)),
    "NoPE on rope layers": ("scout", lambda c: all_layers(c, uses_rope=False)),
    "qk norm left out": ("scout", lambda c: {"use_qk_norm": False}),
    "qk norm put in": ("maverick", lambda c: {"use_qk_norm": True}),
    "temperature left out": ("scout", lambda c: {"attn_temperature_tuning": False}),
    "temperature put in": ("untuned-odd-chunk", lambda c: {"attn_temperature_tuning": True}),
    "floor scale": ("scout", lambda c: {"floor_scale": c.floor_scale + 1}),
    "one expert instead of two": ("scout-top-2", lambda c: {"experts_per_token": 1}),
    "norm epsilon": ("scout", lambda c: {"rms_norm_eps": 1e-2}),
}


@pytest.mark.parametrize("name", CONFIG_MUTATIONS)
def test_a_falsified_config_is_noticed(name: str, reference_of: References) -> None:
    model, change = CONFIG_MUTATIONS[name]
    reference = reference_of(model)
    assert error_of(reference, **change(read_config(reference.directory))) > TOLERANCE


def half_rotation(x_THC: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    first, second = x_THC.chunk(2, dim=-1)
    turned = torch.complex(first, second) * rotation[:, None, :]
    return torch.cat([turned.real, turned.imag], dim=-1)


def norm_over_all_heads(x_THC: torch.Tensor, eps: float) -> torch.Tensor:
    return x_THC * torch.rsqrt(x_THC.pow(2).mean((-1, -2), keepdim=True) + eps)


def temperature_one_late(config: ModelConfig, position_T: torch.Tensor) -> torch.Tensor:
    return 1.0 + config.attn_scale * torch.log1p(torch.floor(position_T.float() / config.floor_scale))


def up_before_gate(gate_up_NF2: torch.Tensor) -> torch.Tensor:
    up_NF, gate_NF = gate_up_NF2.chunk(2, dim=-1)
    return F.silu(gate_NF) * up_NF


def softmax_scores(logit_TE: torch.Tensor, experts_per_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    score_TA, expert_TA = torch.topk(torch.softmax(logit_TE, dim=-1), experts_per_token, dim=-1)
    return expert_TA, score_TA


def renormalised_scores(logit_TE: torch.Tensor, experts_per_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    top_TA, expert_TA = torch.topk(logit_TE, experts_per_token, dim=-1)
    score_TA = torch.sigmoid(top_TA)
    return expert_TA, score_TA / score_TA.sum(dim=-1, keepdim=True)


def see_the_future(q_THC: torch.Tensor, k_KSC: torch.Tensor, v_KSC: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q_THC.transpose(0, 1), k_KSC, v_KSC, enable_gqa=True).transpose(0, 1)


CODE_MUTATIONS: dict[str, tuple[str, Any, str, Any]] = {
    "half rotation instead of interleaved": ("maverick", router.model.heads, "rotate", half_rotation),
    "qk norm over all heads": ("scout", router.model.heads, "qk_norm", norm_over_all_heads),
    "temperature one position late": ("scout", router.model.llama4, "query_temperature", temperature_one_late),
    "up before gate": ("maverick", kernels.grouped_mlp, "swiglu", up_before_gate),
    "softmax instead of sigmoid": ("scout", router.model.moe, "choose_experts", softmax_scores),
    "renormalised scores": ("scout-top-2", router.model.moe, "choose_experts", renormalised_scores),
    "no causal mask": ("scout", router.model.heads, "causal_attention", see_the_future),
}


@pytest.mark.parametrize("name", CODE_MUTATIONS)
def test_a_wrong_formula_is_noticed(name: str, reference_of: References, monkeypatch: pytest.MonkeyPatch) -> None:
    model, module, function, wrong = CODE_MUTATIONS[name]
    monkeypatch.setattr(module, function, wrong)
    assert error_of(reference_of(model)) > TOLERANCE


def test_a_score_on_the_output_instead_of_the_input_is_noticed(
    reference_of: References, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatch, combine = Dispatcher.dispatch, Dispatcher.combine
    scores: dict[int, torch.Tensor] = {}

    def unscaled(self: Dispatcher, layer: int, x_TD: Any, expert_TA: Any, score_TA: torch.Tensor) -> DispatchHandle:
        handle = dispatch(self, layer, x_TD, expert_TA, torch.ones_like(score_TA))
        scores[id(handle)] = score_TA
        return handle

    def scaled(self: Dispatcher, handle: DispatchHandle) -> torch.Tensor:
        return combine(self, handle) * scores[id(handle)]

    monkeypatch.setattr(Dispatcher, "dispatch", unscaled)
    monkeypatch.setattr(Dispatcher, "combine", scaled)
    assert error_of(reference_of("maverick")) > TOLERANCE


def test_norms_in_the_wrong_order_are_noticed(reference_of: References, monkeypatch: pytest.MonkeyPatch) -> None:
    def swap_norms(self: router.model.llama4.Layer, x_TD: torch.Tensor, step: Any) -> torch.Tensor:
        x_TD = x_TD + self._attention(self._mlp_norm(x_TD), step)
        return x_TD + self._mlp(self._attention_norm(x_TD))

    monkeypatch.setattr(router.model.llama4.Layer, "__call__", swap_norms)
    assert error_of(reference_of("scout")) > TOLERANCE


def test_a_norm_after_instead_of_before_is_noticed(reference_of: References, monkeypatch: pytest.MonkeyPatch) -> None:
    def post_norm(self: router.model.llama4.Layer, x_TD: torch.Tensor, step: Any) -> torch.Tensor:
        x_TD = x_TD + self._attention_norm(self._attention(x_TD, step))
        return x_TD + self._mlp_norm(self._mlp(x_TD))

    monkeypatch.setattr(router.model.llama4.Layer, "__call__", post_norm)
    assert error_of(reference_of("scout")) > TOLERANCE


def sigmoid_before_top_k(logit_TE: torch.Tensor, experts_per_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    score_TA, expert_TA = torch.topk(torch.sigmoid(logit_TE), experts_per_token, dim=-1)
    return expert_TA, score_TA


def test_top_k_after_the_sigmoid_is_noticed_where_sigmoids_tie(
    reference_of: References, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided = reference_of("scout", gate_std=60.0)
    assert error_of(decided) < TOLERANCE
    monkeypatch.setattr(router.model.moe, "choose_experts", sigmoid_before_top_k)
    assert error_of(decided) > TOLERANCE

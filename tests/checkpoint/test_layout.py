"""Tensor names, shapes and parameter counts are transformers' own, and add up to the released models' sizes."""

from math import prod
from typing import Any

import pytest
import torch
from transformers import Llama4Config, Llama4ForCausalLM, Llama4ForConditionalGeneration, Llama4TextConfig

from checkpoint.config import ModelConfig, parse_config
from checkpoint.layout import Role, TensorNames, count_parameters, tensor_specs

RELEASED: dict[str, dict[str, Any]] = {
    "scout": {"num_local_experts": 16, "interleave_moe_layer_step": 1, "use_qk_norm": True},
    "maverick": {"num_local_experts": 128, "interleave_moe_layer_step": 2, "use_qk_norm": False},
}
SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "intermediate_size": 14,
    "intermediate_size_mlp": 22,
    "num_local_experts": 5,
}
MODELS = {
    **RELEASED,
    "small with its own MoE layers": {**SMALL, "moe_layers": [0, 3]},
    "small and dense": {**SMALL, "moe_layers": []},
}


def parse(fields: dict[str, Any]) -> ModelConfig:
    return parse_config({"architectures": ["Llama4ForCausalLM"], **fields}, "config.json")


def shapes_here(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: spec.shape for name, spec in tensor_specs(config).items()}


def shapes_there(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def build(model_class: Any, config: Any) -> torch.nn.Module:
    """The model without memory for its weights."""
    with torch.device("meta"):
        model: torch.nn.Module = model_class(config)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_are_those_of_the_causal_lm(name: str) -> None:
    theirs = build(Llama4ForCausalLM, Llama4TextConfig(**MODELS[name]))
    assert shapes_here(parse(MODELS[name])) == shapes_there(theirs)


@pytest.mark.parametrize("name", MODELS)
def test_the_parameter_count_is_that_of_the_causal_lm(name: str) -> None:
    theirs = build(Llama4ForCausalLM, Llama4TextConfig(**MODELS[name]))
    total, _ = count_parameters(parse(MODELS[name]))
    assert total == sum(parameter.numel() for parameter in theirs.parameters())


def test_names_and_shapes_are_those_of_the_multimodal_models_text_part() -> None:
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    theirs = build(Llama4ForConditionalGeneration, Llama4Config(text_config=SMALL, vision_config=vision))
    ours = parse_config({"architectures": ["Llama4ForConditionalGeneration"], "text_config": SMALL}, "config.json")
    text_part = {name: shape for name, shape in shapes_there(theirs).items() if name.startswith("language_model.")}
    assert shapes_here(ours) == text_part


def test_a_tied_output_head_has_no_tensor() -> None:
    tied, untied = parse({**SMALL, "tie_word_embeddings": True}), parse(SMALL)
    assert set(tensor_specs(untied)) - set(tensor_specs(tied)) == {"lm_head.weight"}
    theirs = build(Llama4ForCausalLM, Llama4TextConfig(**SMALL, tie_word_embeddings=True))
    assert count_parameters(tied)[0] == sum(parameter.numel() for parameter in theirs.parameters())


def test_tensor_names_name_tensors_of_the_layout() -> None:
    config = parse(SMALL)
    names, specs = TensorNames(config), tensor_specs(config)
    assert specs[names.embedding].role is Role.EMBEDDING
    assert specs[names.lm_head].role is Role.LM_HEAD
    assert specs[names.final_norm].role is Role.NORM
    assert specs[names.expert_gate_up(2)].shape == (5, 24, 28)
    assert specs[names.expert_down(2)].shape == (5, 14, 24)


VISION_AND_PROJECTOR_BILLIONS = 0.851 + 0.021


@pytest.mark.parametrize(
    ("name", "total_with_vision_billions", "active_billions"),
    [("scout", 108.642, 17.173), ("maverick", 401.584, 17.185)],
)
def test_released_models_have_their_published_size(
    name: str, total_with_vision_billions: float, active_billions: float
) -> None:
    total, active = count_parameters(parse(RELEASED[name]))
    rounding = 0.0015
    assert total / 1e9 == pytest.approx(total_with_vision_billions - VISION_AND_PROJECTOR_BILLIONS, abs=rounding)
    assert active / 1e9 == pytest.approx(active_billions, abs=rounding)


def test_one_released_expert_has_125_829_120_parameters() -> None:
    experts = [spec for spec in tensor_specs(parse(RELEASED["maverick"])).values() if spec.role is Role.ROUTED_EXPERTS]
    assert sum(prod(spec.shape[1:]) for spec in experts) == 24 * 125_829_120

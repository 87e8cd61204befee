"""The training model is Llama 4: against transformers, and its fast parts against slow ones."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Llama4ForCausalLM, Llama4TextConfig

from checkpoint.config import parse_config
from checkpoint.layout import tensor_specs
from checkpoint.shape import ModelShape, config_json
from demo.model import Experts, GatedMLP, Llama4, MoE
from demo.shapes import DENSE_TWIN, SHIPPED
from tests.demo.tiny import TINY, drawn_model, token_ids

DENSE = replace(TINY, num_local_experts=0)
COUNTS = {"even": [3] * 8, "uneven": [0, 7, 1, 0, 30, 2, 0, 1], "one for all": [0, 0, 9, 0, 0, 0, 0, 0], "one": [1]}


def config_fields(shape: ModelShape) -> dict[str, Any]:
    return config_json(shape, "float32", "Llama4ForCausalLM", None)


def on_meta(shape: ModelShape) -> Llama4:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return Llama4(shape)


# Against transformers


def transformers_model(model: Llama4) -> Llama4ForCausalLM:
    fields = {name: value for name, value in config_fields(model.shape).items() if name != "architectures"}
    config = Llama4TextConfig(**fields)
    config._attn_implementation = "eager"
    theirs = Llama4ForCausalLM(config).eval()
    theirs.load_state_dict(model.state_dict())
    return theirs


@pytest.mark.parametrize("length", [1, 7, 16, 32, 64], ids=lambda length: f"{length} tokens")
@torch.no_grad()
def test_logits_are_transformers_own(length: int) -> None:
    """Within a chunk of 16, at its end, and over several; the last layer sees beyond them."""
    model, ids_NL = drawn_model(), token_ids(3, length)
    logits_NLV = model.lm_head(model(ids_NL).hidden_NLD)
    expected_NLV = transformers_model(model)(ids_NL).logits
    assert expected_NLV.std() > 0.5, "the weights are wide enough to tell models apart"
    assert (logits_NLV - expected_NLV).abs().max() < 1e-4


@torch.no_grad()
def test_every_layer_may_have_experts_as_in_scout() -> None:
    model = drawn_model(replace(TINY, interleave_moe_layer_step=1))
    logits_NLV = model.lm_head(model(token_ids(2, 32)).hidden_NLD)
    assert (logits_NLV - transformers_model(model)(token_ids(2, 32)).logits).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [TINY, SHIPPED], ids=["tiny", "shipped"])
def test_weights_are_named_and_shaped_as_in_a_checkpoint(shape: ModelShape) -> None:
    specs = tensor_specs(parse_config(config_fields(shape), "config.json"))
    ours = {name: tuple(weight.shape) for name, weight in on_meta(shape).state_dict().items()}
    assert ours == {name: spec.shape for name, spec in specs.items()}


@torch.no_grad()
def test_windows_do_not_see_each_other() -> None:
    model, ids_NL = drawn_model(), token_ids(3, 32)
    together = model(ids_NL).hidden_NLD
    alone = torch.cat([model(ids_L[None]).hidden_NLD for ids_L in ids_NL])
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_window_holds_whole_chunks() -> None:
    with pytest.raises(AssertionError, match="whole chunks"):
        drawn_model()(token_ids(1, 17))


def test_a_new_model_finds_every_token_equally_likely() -> None:
    model = Llama4(TINY)
    assert (model.lm_head(model(token_ids(1, 16)).hidden_NLD) == 0).all()


# Experts


def drawn_experts() -> Experts:
    experts = Experts(TINY)
    torch.manual_seed(1)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return experts


def one_by_one(experts: Experts, x_TD: Tensor, expert_T: Tensor) -> Tensor:
    """The slow twin: each row times its own expert's matrices."""
    rows = []
    for x_D, expert in zip(x_TD, expert_T.tolist(), strict=True):
        gate_F, up_F = (x_D @ experts.gate_up_proj[expert]).chunk(2)
        rows.append((F.silu(gate_F) * up_F) @ experts.down_proj[expert])
    return torch.stack(rows)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_batched_experts_match_the_slow_twin(counts: list[int]) -> None:
    """In value, and in every gradient."""
    torch.manual_seed(2)
    expert_T = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    expert_T = expert_T[torch.randperm(len(expert_T))]
    x_TD, weight_TD = torch.randn(len(expert_T), TINY.hidden_size), torch.randn(len(expert_T), TINY.hidden_size)
    results = []
    for compute in (Experts.forward, one_by_one):
        experts, inputs_TD = drawn_experts(), x_TD.clone().requires_grad_()
        out_TD = compute(experts, inputs_TD, expert_T)
        (out_TD * weight_TD).sum().backward()
        results.append([out_TD, inputs_TD.grad, experts.gate_up_proj.grad, experts.down_proj.grad])
    for fast, slow in zip(*results, strict=True):
        assert torch.allclose(fast, slow, atol=1e-5)


def moe_with_identity_router() -> MoE:
    """A token's logits are 100 times its first eight values."""
    moe = MoE(TINY)
    with torch.no_grad():
        for weight in moe.parameters():
            weight.normal_(0, 0.1)
        moe.router.weight.copy_(100 * torch.eye(TINY.num_local_experts, TINY.hidden_size))
    return moe


def test_balance_is_one_when_experts_are_loaded_evenly() -> None:
    x_NLD = torch.eye(TINY.num_local_experts, TINY.hidden_size).repeat(4, 1)[None]
    _, balance, experts_NL = moe_with_identity_router()(x_NLD)
    assert balance.item() == pytest.approx(1.0)
    assert experts_NL.tolist() == [[*range(TINY.num_local_experts)] * 4]


def test_balance_is_the_number_of_experts_when_one_gets_all() -> None:
    x_NLD = torch.eye(TINY.num_local_experts, TINY.hidden_size)[3].expand(2, 16, -1)
    _, balance, experts_NL = moe_with_identity_router()(x_NLD)
    assert balance.item() == pytest.approx(TINY.num_local_experts)
    assert (experts_NL == 3).all()


def test_balance_pushes_the_router() -> None:
    moe = moe_with_identity_router()
    torch.manual_seed(3)
    _, balance, _ = moe(0.01 * torch.randn(2, 16, TINY.hidden_size))
    balance.backward()
    assert moe.router.weight.grad.abs().max() > 0


def test_a_trunk_tells_every_tokens_expert_in_every_moe_layer() -> None:
    trunk = drawn_model()(token_ids(3, 32))
    assert [experts_NL.shape for experts_NL in trunk.experts_NL] == [(3, 32), (3, 32)]
    assert all(len(experts_NL.unique()) > 2 for experts_NL in trunk.experts_NL)
    assert 1 <= trunk.balance < TINY.num_local_experts


# The dense twin


@pytest.mark.parametrize(("mixture", "twin"), [(TINY, DENSE), (SHIPPED, DENSE_TWIN)], ids=["tiny", "shipped"])
def test_the_dense_twin_has_the_mixtures_active_parameters(mixture: ModelShape, twin: ModelShape) -> None:
    """One of the experts counted, its router not; everything else is the same in both."""
    active = sum(
        weight.numel() // (mixture.num_local_experts if ".experts." in name else 1)
        for name, weight in on_meta(mixture).named_parameters()
        if not name.endswith("router.weight")
    )
    assert sum(weight.numel() for weight in on_meta(twin).parameters()) == active


def test_the_dense_twin_routes_nothing() -> None:
    twin = drawn_model(DENSE)
    trunk = twin(token_ids(1, 16))
    assert not [module for module in twin.modules() if isinstance(module, MoE)]
    assert trunk.experts_NL == []
    assert trunk.balance == 0


def test_the_dense_twins_mlps_are_as_wide_as_a_shared_and_a_routed_expert() -> None:
    widths = [module.gate_proj.out_features for module in on_meta(DENSE).modules() if isinstance(module, GatedMLP)]
    assert widths == [TINY.intermediate_size_mlp, 2 * TINY.intermediate_size] * 2

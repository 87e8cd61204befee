"""config.json as transformers 4 and 5 write it becomes the same ModelConfig; what is wrong is named."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Llama4Config, Llama4TextConfig

from checkpoint.config import LayerConfig, ModelConfig, RopeScaling, parse_config, read_config
from checkpoint.errors import CheckpointError
from checkpoint.naming import Naming

TEXT: dict[str, Any] = {"architectures": ["Llama4ForCausalLM"], "num_hidden_layers": 4}
SCOUT_SCALING = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}

CHUNKED_MOE = LayerConfig(uses_rope=True, is_chunked=True, is_moe=True)
CHUNKED_DENSE = LayerConfig(uses_rope=True, is_chunked=True, is_moe=False)
GLOBAL_MOE = LayerConfig(uses_rope=False, is_chunked=False, is_moe=True)


def parse(**changes: Any) -> ModelConfig:
    return parse_config({**TEXT, **changes}, "config.json")


def test_absent_fields_have_the_defaults_of_transformers() -> None:
    theirs = Llama4TextConfig()
    ours = parse_config({"architectures": ["Llama4ForCausalLM"]}, "config.json")
    assert (ours.vocab_size, ours.hidden_size, ours.num_layers) == (202048, 5120, 48)
    assert (ours.num_heads, ours.num_kv_heads, ours.head_dim) == (40, 8, 128)
    assert (ours.intermediate_size, ours.intermediate_size_mlp) == (8192, 16384)
    assert (ours.num_experts, ours.experts_per_token, len(ours.moe_layers)) == (16, 1, 48)
    assert (ours.use_qk_norm, ours.attn_temperature_tuning, ours.tie_word_embeddings) == (True, True, False)
    assert (ours.floor_scale, ours.attn_scale, ours.attention_chunk_size) == (8192, 0.1, 8192)
    assert (ours.rms_norm_eps, ours.rope_theta, ours.rope_scaling) == (1e-5, 500000.0, None)
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert (ours.bos_token_id, ours.eos_token_ids) == (theirs.bos_token_id, (theirs.eos_token_id,))


SAVED_BY_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "nothing given": {},
    "scout": {"rope_parameters": {**SCOUT_SCALING, "rope_theta": 500000.0}, "max_position_embeddings": 10_485_760},
    "maverick": {"num_local_experts": 128, "interleave_moe_layer_step": 2, "use_qk_norm": False},
    "own layer lists": {
        "num_hidden_layers": 3,
        "moe_layers": [1],
        "no_rope_layers": [0, 1, 1],
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
    },
    "all else": {
        "vocab_size": 300,
        "hidden_size": 64,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "intermediate_size": 24,
        "intermediate_size_mlp": 40,
        "num_experts_per_tok": 2,
        "no_rope_layer_interval": 3,
        "attention_chunk_size": 32,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attn_temperature_tuning": False,
        "floor_scale": 16,
        "attn_scale": 0.2,
        "tie_word_embeddings": True,
        "bos_token_id": 7,
        "eos_token_id": [8, 9],
        "dtype": "float16",
    },
}


def expected(theirs: Llama4TextConfig, prefix: str) -> ModelConfig:
    """What Drover should make of transformers' own config object."""
    rope = dict(theirs.rope_parameters)
    scaled = rope["rope_type"] == "llama3"
    return ModelConfig(
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.hidden_size,
        num_heads=theirs.num_attention_heads,
        num_kv_heads=theirs.num_key_value_heads,
        head_dim=theirs.head_dim,
        intermediate_size=theirs.intermediate_size,
        intermediate_size_mlp=theirs.intermediate_size_mlp,
        num_experts=theirs.num_local_experts,
        experts_per_token=theirs.num_experts_per_tok,
        layers=tuple(
            LayerConfig(bool(theirs.no_rope_layers[i]), kind == "chunked_attention", i in theirs.moe_layers)
            for i, kind in enumerate(theirs.layer_types)
        ),
        attention_chunk_size=theirs.attention_chunk_size,
        max_position_embeddings=theirs.max_position_embeddings,
        rms_norm_eps=theirs.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        rope_scaling=RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_positions=8192)
        if scaled
        else None,
        use_qk_norm=theirs.use_qk_norm,
        attn_temperature_tuning=theirs.attn_temperature_tuning,
        floor_scale=theirs.floor_scale,
        attn_scale=theirs.attn_scale,
        tie_word_embeddings=theirs.tie_word_embeddings,
        bos_token_id=theirs.bos_token_id,
        eos_token_ids=tuple(theirs.eos_token_id) if isinstance(theirs.eos_token_id, list) else (theirs.eos_token_id,),
        dtype=str(theirs.dtype or "").removeprefix("torch."),
        naming=Naming(f"{prefix}model.", f"{prefix}lm_head.weight"),
    )


@pytest.mark.parametrize("name", SAVED_BY_TRANSFORMERS)
def test_a_text_config_saved_by_transformers_means_the_same_here(name: str, tmp_path: Path) -> None:
    theirs = Llama4TextConfig(**SAVED_BY_TRANSFORMERS[name])
    theirs.save_pretrained(tmp_path)
    assert read_config(tmp_path) == expected(theirs, "")


@pytest.mark.parametrize("name", SAVED_BY_TRANSFORMERS)
def test_the_text_part_of_a_multimodal_config_means_the_same_here(name: str, tmp_path: Path) -> None:
    theirs = Llama4Config(text_config=SAVED_BY_TRANSFORMERS[name])
    theirs.save_pretrained(tmp_path)
    assert read_config(tmp_path) == expected(theirs.text_config, "language_model.")


def test_rope_scaling_of_transformers_4_is_rope_parameters_of_5() -> None:
    of_4 = parse(rope_theta=10000.0, rope_scaling=SCOUT_SCALING)
    of_5 = parse(rope_parameters={**SCOUT_SCALING, "rope_theta": 10000.0})
    assert of_4 == of_5
    assert of_4.rope_theta == 10000.0
    assert of_4.rope_scaling == RopeScaling(16.0, 1.0, 1.0, 8192)


@pytest.mark.parametrize("absent", [{}, {"rope_scaling": None}, {"rope_parameters": {"rope_type": "default"}}])
def test_rope_without_scaling(absent: dict[str, Any]) -> None:
    assert parse(**absent).rope_scaling is None


@pytest.mark.parametrize(("stored", "meaning"), [(4, True), (True, True), (0, False), (False, False)])
def test_temperature_tuning_may_be_an_old_integer(stored: int, meaning: bool) -> None:
    assert parse(attn_temperature_tuning=stored).attn_temperature_tuning is meaning


@pytest.mark.parametrize("derived", [{}, {"no_rope_layers": []}, {"no_rope_layers": None}])
def test_every_fourth_layer_has_no_rope_where_the_list_is_empty(derived: dict[str, Any]) -> None:
    assert parse(**derived).layers == (CHUNKED_MOE, CHUNKED_MOE, CHUNKED_MOE, GLOBAL_MOE)


def test_interleaving_puts_experts_into_every_second_layer() -> None:
    config = parse(interleave_moe_layer_step=2)
    assert config.layers == (CHUNKED_DENSE, CHUNKED_MOE, CHUNKED_DENSE, GLOBAL_MOE)
    assert config.moe_layers == (1, 3)


def test_without_a_chunk_size_every_layer_is_global() -> None:
    assert not any(layer.is_chunked for layer in parse(attention_chunk_size=None).layers)


def test_a_null_head_dim_is_derived_from_the_width() -> None:
    assert parse(head_dim=None, hidden_size=5120, num_attention_heads=20, num_key_value_heads=4).head_dim == 256


@pytest.mark.parametrize(("stored", "meaning"), [(5, (5,)), ([5, 6], (5, 6)), (None, ())])
def test_end_tokens_are_one_or_a_list(stored: object, meaning: tuple[int, ...]) -> None:
    assert parse(eos_token_id=stored).eos_token_ids == meaning


def test_end_tokens_of_the_generation_config_win(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TEXT, "eos_token_id": 5}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [200001, 200007, 200008]}))
    assert read_config(tmp_path).eos_token_ids == (200001, 200007, 200008)


@pytest.mark.parametrize(
    ("name", "meaning"),
    [("half", "float16"), ("float", "float32"), ("float64", "float32"), ("double", "float32"), ("float16", "float16")],
)
def test_a_dtype_has_the_names_that_torch_has(name: str, meaning: str) -> None:
    assert parse(dtype=name).dtype == parse(torch_dtype=name).dtype == meaning


def test_swish_is_another_name_of_silu() -> None:
    assert parse(hidden_act="swish") == parse(hidden_act="silu")


def test_numbers_that_are_none_do_not_matter_where_none_is_read(tmp_path: Path) -> None:
    """transformers, too, loads such a file."""
    (tmp_path / "config.json").write_text(json.dumps(TEXT | {"attention_dropout": float("nan"), "x": float("inf")}))
    assert read_config(tmp_path) == parse()


def test_dtype_of_transformers_4_is_called_torch_dtype() -> None:
    assert parse(torch_dtype="float16").dtype == "float16"


BAD_FIELDS = [
    (
        {"architectures": ["LlamaForCausalLM"]},
        "architectures is 'LlamaForCausalLM' .*; Drover serves Llama4ForCausalLM and Llama4For",
    ),
    ({"architectures": [["Llama4ForCausalLM"]]}, "architectures is"),
    ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM' and"),
    ({"architectures": 7}, "architectures is 7; it must be a JSON array"),
    ({"quantization_config": {"quant_method": "x" * 100_000}}, f"quant_method '{'x' * 90}.{{,200}}$"),
    ({"quantization_config": {"quant_method": "compressed-tensors"}}, "quant_method 'compressed-tensors'; only bfl"),
    ({"quantization_config": "fp8"}, "quantization_config is 'fp8'; it must be a JSON object"),
    ({"hidden_size": 0}, "hidden_size is 0; it must be a whole number of at least 1"),
    ({"hidden_size": 5120.0}, "hidden_size is 5120.0; it must be a whole number"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True; it must be a whole number"),
    ({"vocab_size": None}, "vocab_size is None; it must be a whole number"),
    ({"num_attention_heads": 12}, r"num_attention_heads is 12; it must be a multiple of num_key_value_heads \(8\)"),
    ({"head_dim": 63}, "head_dim is 63; it must be even"),
    ({"num_experts_per_tok": 17}, r"num_experts_per_tok is 17; it must be at most num_local_experts \(16\)"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be 'silu'"),
    ({"attention_bias": True}, "attention_bias is True; it must be false"),
    ({"use_qk_norm": None}, "use_qk_norm is None; it must be true or false"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; it must be true or false"),
    ({"attn_temperature_tuning": "off"}, "attn_temperature_tuning is 'off'; it must be a JSON whole number"),
    ({"dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn'; it must be one of bfloat16, float16, float32"),
    ({"rms_norm_eps": -1}, "rms_norm_eps is -1; it must be a finite number above 0"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be a finite number above 0"),
    ({"attn_scale": float("inf")}, "attn_scale is inf; it must be a finite number above 0"),
    ({"attn_scale": 10**400}, "attn_scale is 1000.*it must be a finite number above 0"),
    ({"floor_scale": 0.5}, "floor_scale is 0.5; it must be a whole number of at least 1"),
    ({"attention_chunk_size": 0}, "attention_chunk_size is 0; it must be a whole number of at least 1"),
    ({"no_rope_layers": [1, 0]}, r"no_rope_layers is \[1, 0\]; it must be a list of num_hidden_layers \(4\) entries"),
    ({"no_rope_layers": [1, 1, 1, "no"]}, "no_rope_layers is 'no'; it must be a list of 1"),
    ({"layer_types": ["full_attention"]}, r"layer_types is .*num_hidden_layers \(4\) entries"),
    ({"layer_types": ["sliding_attention"] * 4}, "'sliding_attention'; it must be 'chunked_attention' or 'full_"),
    ({"moe_layers": ["1"]}, "moe_layers is '1'; it must be a layer index"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling: rope_type is 'yarn'; it must be 'default' or 'llama3'"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling: factor is None; it must be a finite number above 0"),
    ({"rope_scaling": {**SCOUT_SCALING, "high_freq_factor": 0.5}}, r"high_freq_factor is 0.5; .*low_freq_factor \(1"),
    (
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "rope_parameters: partial_rotary_factor is 0.5; it must be 1",
    ),
    ({"eos_token_id": [1, "2"]}, "eos_token_id is '2'; it must be a token id, or a list of them"),
    ({"bos_token_id": "<s>"}, "bos_token_id is '<s>'; it must be a token id"),
]


@pytest.mark.parametrize(("change", "message"), BAD_FIELDS, ids=[f"{next(iter(c))}-{m[:12]}" for c, m in BAD_FIELDS])
def test_a_bad_field_is_named_with_its_value_and_what_is_valid(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse(**change)


FULL = {**Llama4TextConfig(num_hidden_layers=4).to_dict(), **TEXT, "dtype": "bfloat16", "rope_scaling": SCOUT_SCALING}
JSON_LEAVES = st.none() | st.booleans() | st.integers(-9, 99) | st.floats() | st.sampled_from(["", "llama3", "a"])
JSON_VALUES = st.recursive(JSON_LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner))


@given(field=st.sampled_from(sorted(FULL)), value=JSON_VALUES)
def test_any_value_of_any_field_is_parsed_or_refused(field: str, value: object) -> None:
    with suppress(CheckpointError):
        assert isinstance(parse_config({**FULL, field: value}, "config.json"), ModelConfig)


def test_a_bad_field_of_a_multimodal_config_is_named_with_its_part() -> None:
    raw = {"architectures": ["Llama4ForConditionalGeneration"], "text_config": {"head_dim": 63}}
    with pytest.raises(CheckpointError, match=r"config\.json: text_config: head_dim is 63"):
        parse_config(raw, "config.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing; a checkpoint is a Hugging Face Llama 4 directory"),
        (b"{", ": not JSON .*; download the file again"),
        (b"\xff\xfe\x00", " is not UTF-8 .*; download the file again"),
        (b'{"hidden_size": ' + b"1" * 5000 + b"}", ": not JSON .*digits"),
        (b"[" * 100_000, ": not JSON that can be read .nested too deeply"),
        (b"[]", ": holds no JSON object"),
        (b'{"model_type": "llama4_text", "attn_scale": NaN}', ": attn_scale is nan; it must be a finite number"),
        (b'{"model_type": "llama4_text", "attn_scale": 1e999}', ": attn_scale is inf; it must be a finite number"),
    ],
    ids=["missing", "cut", "no UTF-8", "endless number", "endless nesting", "no object", "NaN", "infinite"],
)
def test_an_unreadable_config_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json ?{message}"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("tokens", "gigabytes"), [(131_072, 7.65), (1_048_576, 52.7), (10_485_760, 516.6)], ids=["128K", "1M", "10M"]
)
def test_kv_bytes_of_scout_in_bf16(tokens: int, gigabytes: float) -> None:
    scout = parse(num_hidden_layers=48)
    assert scout.kv_bytes(tokens, 2) == 4096 * (12 * tokens + 36 * 8192)
    assert scout.kv_bytes(tokens, 2) / 1e9 == pytest.approx(gigabytes, rel=1e-3)


def test_kv_bytes_within_the_first_chunk_count_every_layer() -> None:
    assert parse(num_hidden_layers=48).kv_bytes(100, 2) == 48 * 100 * 4096


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 10**9), ("num_local_experts", 10**9), ("hidden_size", 2**60), ("vocab_size", 10**4000)],
)
def test_sizes_beyond_any_model_are_refused_before_they_cost_anything(field: str, value: int) -> None:
    with pytest.raises(CheckpointError, match=f"{field} is [0-9]+.*; it must be at most") as caught:
        parse(**{field: value})
    assert len(str(caught.value)) < 400


GUARD = {"num_hidden_layers": 2, "interleave_moe_layer_step": 0, "moe_layers": [], "attention_chunk_size": None}


@pytest.mark.parametrize("experts", [{}, {"num_local_experts": 0, "num_experts_per_tok": 0}], ids=["named", "none"])
def test_a_dense_model_has_no_experts(experts: dict[str, int]) -> None:
    """Llama Guard 4."""
    config = parse(**GUARD, **experts)
    assert (config.moe_layers, config.num_experts, config.experts_per_token) == ((), 0, 0)
    assert not any(layer.is_chunked for layer in config.layers)


NAMED: dict[str, dict[str, Any]] = {
    "by a class that is no list": {"architectures": "Llama4ForCausalLM"},
    "by model_type alone": {"architectures": None, "model_type": "llama4_text"},
    "by a class of another name": {"architectures": ["Llama4TextModel"], "model_type": "llama4_text"},
    "as text, but nested": {"model_type": "llama4", "text_config": {"num_hidden_layers": 4}},
    "as multimodal, but flat": {"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4"},
    "second": {"architectures": ["Guard", "Llama4ForCausalLM"]},
}


@pytest.mark.parametrize("name", NAMED)
def test_names_and_nesting_may_be_mixed(name: str) -> None:
    assert parse(**NAMED[name]).num_layers == 4


def test_a_shortened_model_may_list_experts_of_layers_that_it_no_longer_has() -> None:
    assert parse(num_hidden_layers=4, moe_layers=[1, 3, 5, 7]).moe_layers == (1, 3)


def test_a_beginning_token_that_the_vocabulary_lacks_is_none() -> None:
    assert parse(bos_token_id=10**9).bos_token_id is None


def test_a_model_of_another_type_is_refused_whatever_class_it_names() -> None:
    with pytest.raises(CheckpointError, match="model_type 'llama'; Drover serves Llama4ForCausalLM"):
        parse(model_type="llama")

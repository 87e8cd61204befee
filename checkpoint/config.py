"""The shape of a Llama 4 text model, read from a Hugging Face config.json.

Accepts what transformers 4 and 5 write: `rope_scaling` + `rope_theta` or `rope_parameters`, an
integer `attn_temperature_tuning`, an empty `no_rope_layers`. Fields that are absent have the
defaults of transformers' Llama4TextConfig, because save_pretrained leaves defaults out.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from checkpoint.errors import CheckpointError

ARCHITECTURES = {"Llama4ForCausalLM": "", "Llama4ForConditionalGeneration": "language_model."}
DTYPES = ("bfloat16", "float16", "float32")
_JSON_NAMES = {dict: "object", list: "array", str: "string", int: "whole number"}


@dataclass(frozen=True)
class RopeScaling:
    """llama3-type scaling of rotary frequencies (Llama 3.1 paper's code; transformers `_compute_llama3_parameters`).

    factor: divides the frequencies whose wavelength exceeds original_positions / low_freq_factor.
    original_positions: context length of pre-training, tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True)
class LayerConfig:
    """The properties that differ between layers.

    uses_rope: rotary positions, with QK norm if the model has it. Otherwise NoPE with temperature
    tuning.
    is_chunked: a token attends to its own attention chunk only. Otherwise to all tokens before it.
    is_moe: routed experts and a shared expert. Otherwise a dense MLP.
    """

    uses_rope: bool
    is_chunked: bool
    is_moe: bool


@dataclass(frozen=True)
class SamplingDefaults:
    """Defaults from generation_config.json for parameters that a request leaves out.

    Units as in inference.proto.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """A Llama 4 text model. Sizes are element counts.

    intermediate_size: width of one routed expert and of the shared expert.
    intermediate_size_mlp: width of the MLP of dense layers.
    attention_chunk_size: tokens per attention chunk of chunked layers, absolute positions.
    floor_scale, attn_scale: NoPE layers multiply the query at position p by
        1 + attn_scale * ln(floor((p + 1) / floor_scale) + 1), if attn_temperature_tuning.
    tensor_prefix: what precedes `model.` and `lm_head.` in tensor names.
    """

    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    intermediate_size_mlp: int
    num_experts: int
    experts_per_token: int
    layers: tuple[LayerConfig, ...]
    attention_chunk_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    use_qk_norm: bool
    attn_temperature_tuning: bool
    floor_scale: int
    attn_scale: float
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str
    tensor_prefix: str
    sampling_defaults: SamplingDefaults = SamplingDefaults()

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """0-based indices of the layers with routed experts."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.is_moe)

    def kv_bytes(self, positions: int, bytes_per_value: int) -> int:
        """KV cache of one sequence of `positions` tokens, in bytes.

        Global layers keep every position, chunked layers at most one chunk:
        2 * kv_heads * head_dim * bytes * (global_layers * P + chunked_layers * min(P, chunk)).
        """
        per_layer_position = 2 * self.num_kv_heads * self.head_dim * bytes_per_value
        chunked = sum(layer.is_chunked for layer in self.layers)
        kept = (self.num_layers - chunked) * positions + chunked * min(positions, self.attention_chunk_size)
        return per_layer_position * kept


def read_config(directory: Path) -> ModelConfig:
    """The config of the checkpoint in `directory`.

    Raises CheckpointError, which names file, field and value.
    """
    path = directory / "config.json"
    config = parse_config(read_json(path), str(path))
    generation = directory / "generation_config.json"
    if generation.exists():
        fields = _Fields(read_json(generation), str(generation))
        # Released checkpoints list all three end tokens only here.
        eos = _token_ids(fields, "eos_token_id") or config.eos_token_ids
        return replace(config, eos_token_ids=eos, sampling_defaults=_sampling_defaults(fields))
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises CheckpointError if the file is missing, unreadable or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a checkpoint is a Hugging Face Llama 4 directory") from None
    except (
        OSError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: not UTF-8, not JSON, or a number with too many digits
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; a JSON object is expected")
    return value


def parse_config(raw: Mapping[str, Any], source: str) -> ModelConfig:
    """Parse and validate the contents of a config.json. source: its path, for error messages."""
    top = _Fields(raw, source)
    architecture = str((top.get("architectures", list, []) or [raw.get("model_type", "")])[0])
    architecture = {"llama4_text": "Llama4ForCausalLM", "llama4": "Llama4ForConditionalGeneration"}.get(
        architecture, architecture
    )
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{source}: architectures is {architecture!r}; Drover serves {' and '.join(ARCHITECTURES)}"
        )
    if quantization := top.get("quantization_config", dict, None):
        method = quantization.get("quant_method", "unknown")
        raise CheckpointError(
            f"{source}: quantization_config has quant_method {method!r}; only {', '.join(DTYPES)} are supported"
        )
    has_vision = architecture == "Llama4ForConditionalGeneration"
    text = _Fields(top.get("text_config", dict, None) or {}, f"{source}: text_config") if has_vision else top

    num_layers = text.positive("num_hidden_layers", 48)
    hidden_size, num_heads = text.positive("hidden_size", 5120), text.positive("num_attention_heads", 40)
    num_kv_heads = text.positive("num_key_value_heads", 8)
    has_null_head_dim = "head_dim" in text.raw and text.raw["head_dim"] is None
    head_dim = max(hidden_size // num_heads, 1) if has_null_head_dim else text.positive("head_dim", 128)
    num_experts, top_k = text.positive("num_local_experts", 16), text.positive("num_experts_per_tok", 1)
    if num_heads % num_kv_heads:
        text.fail("num_attention_heads", num_heads, f"a multiple of num_key_value_heads ({num_kv_heads})")
    if head_dim % 2:
        text.fail("head_dim", head_dim, "even, for rotary pairs")
    if top_k > num_experts:
        text.fail("num_experts_per_tok", top_k, f"at most num_local_experts ({num_experts})")
    if text.get("hidden_act", str, "silu") != "silu":
        text.fail("hidden_act", text.raw["hidden_act"], "'silu'")
    if text.flag("attention_bias", False):
        text.fail("attention_bias", True, "false, as in every Llama 4")

    # transformers 5 writes `dtype`, 4 wrote `torch_dtype`; either level of a multimodal config may
    # carry it.
    dtype = next(
        (f.raw[key] for f in (text, top) for key in ("dtype", "torch_dtype") if f.raw.get(key) is not None), "bfloat16"
    )
    if dtype not in DTYPES:
        text.fail("dtype", dtype, f"one of {', '.join(DTYPES)}")
    rope_theta, rope_scaling = _rope(text)
    chunk = text.get("attention_chunk_size", int, 8192)
    max_positions = text.positive("max_position_embeddings", 131072)
    return ModelConfig(
        vocab_size=text.positive("vocab_size", 202048),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=text.positive("intermediate_size", 8192),
        intermediate_size_mlp=text.positive("intermediate_size_mlp", 16384),
        num_experts=num_experts,
        experts_per_token=top_k,
        layers=_layers(text, num_layers, has_chunks=chunk is not None),
        attention_chunk_size=text.positive("attention_chunk_size", 8192) if chunk is not None else max_positions,
        max_position_embeddings=max_positions,
        rms_norm_eps=text.number("rms_norm_eps", 1e-5),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        use_qk_norm=text.flag("use_qk_norm", True),
        # Old checkpoints carry the integer 4 here, meaning true.
        attn_temperature_tuning=bool(text.get("attn_temperature_tuning", int, True)),
        floor_scale=text.positive("floor_scale", 8192),
        attn_scale=text.number("attn_scale", 0.1),
        tie_word_embeddings=text.flag("tie_word_embeddings", top.flag("tie_word_embeddings", False)),
        bos_token_id=next(iter(_token_ids(text, "bos_token_id") or _token_ids(top, "bos_token_id", 1)), None),
        eos_token_ids=_token_ids(text, "eos_token_id") or _token_ids(top, "eos_token_id", 2),
        dtype=dtype,
        tensor_prefix=ARCHITECTURES[architecture],
    )


def _layers(text: "_Fields", num_layers: int, *, has_chunks: bool) -> tuple[LayerConfig, ...]:
    # `no_rope_layers` is inverted: 1 means that the layer uses RoPE. [] and null mean "derive".
    interval = text.positive("no_rope_layer_interval", 4)
    rope = text.get("no_rope_layers", list, None) or [int((i + 1) % interval != 0) for i in range(num_layers)]
    step = text.positive("interleave_moe_layer_step", 1)
    moe = text.get("moe_layers", list, None)
    moe = list(range(step - 1, num_layers, step)) if moe is None else moe
    types = text.get("layer_types", list, None) or ["chunked_attention" if r else "full_attention" for r in rope]
    for key, values in (("no_rope_layers", rope), ("layer_types", types)):
        if len(values) != num_layers:
            text.fail(key, values, f"a list of num_hidden_layers ({num_layers}) entries")
    for uses_rope in rope:
        if uses_rope not in (0, 1):
            text.fail("no_rope_layers", uses_rope, "a list of 1 (the layer uses RoPE) and 0 (it does not)")
    for kind in types:
        if kind not in ("chunked_attention", "full_attention"):
            text.fail("layer_types", kind, "'chunked_attention' or 'full_attention'")
    for index in moe:
        if not isinstance(index, int) or not 0 <= index < num_layers:
            text.fail("moe_layers", index, f"a layer index below num_hidden_layers ({num_layers})")
    return tuple(
        LayerConfig(bool(rope[i]), has_chunks and types[i] == "chunked_attention", i in moe) for i in range(num_layers)
    )


def _rope(text: "_Fields") -> tuple[float, RopeScaling | None]:
    # transformers 5 folds rope_theta into rope_parameters; 4 had rope_theta beside rope_scaling.
    key = "rope_parameters" if text.raw.get("rope_parameters") else "rope_scaling"
    rope = _Fields(text.get(key, dict, None) or {}, f"{text.source}: {key}")
    theta = rope.number("rope_theta", text.number("rope_theta", 500000.0))
    kind = rope.raw.get("rope_type", rope.raw.get("type", "default"))
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        rope.fail("partial_rotary_factor", rope.raw["partial_rotary_factor"], "1, as in every Llama 4")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        rope.fail("rope_type", kind, "'default' or 'llama3'")
    scaling = RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_positions=rope.positive("original_max_position_embeddings"),
    )
    if scaling.high_freq_factor < scaling.low_freq_factor:
        rope.fail("high_freq_factor", scaling.high_freq_factor, f"at least low_freq_factor ({scaling.low_freq_factor})")
    return theta, scaling


def _token_ids(fields: "_Fields", key: str, default: int | None = None) -> tuple[int, ...]:
    value = fields.raw.get(key, default)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            fields.fail(key, token_id, "a token id, or a list of them")
    return tuple(ids)


def _sampling_defaults(fields: "_Fields") -> SamplingDefaults:
    # `do_sample` is ignored: it only matters to transformers' own `generate`.
    temperature = fields.between("temperature", 0, 100, 1.0)
    top_k = fields.between("top_k", 0, 2**31 - 1, 0)
    if top_k != int(top_k):
        fields.fail("top_k", top_k, "a whole number")
    return SamplingDefaults(temperature, fields.between("top_p", 1e-6, 1, 1.0), int(top_k))


class _Fields:
    """A JSON object. Its fields are read with a type check; errors name the field with its path."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw = raw
        self.source = source

    def fail(self, key: str, value: object, expected: str) -> None:
        raise CheckpointError(f"{self.source}: {key} is {value!r}; it must be {expected}")

    def get(self, key: str, kind: type, default: Any) -> Any:
        value = self.raw.get(key, default)
        if value is not None and not isinstance(value, kind):
            self.fail(key, value, f"a JSON {_JSON_NAMES[kind]}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw.get(key, default)
        if not isinstance(value, bool):
            self.fail(key, value, "true or false")
        return bool(value)

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.fail(key, value, "a whole number of at least 1")
        assert isinstance(value, int)
        return value

    def between(self, key: str, low: float, high: float, default: float) -> float:
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            self.fail(key, value, f"a number from {low:g} to {high:g}")
        assert isinstance(value, (int, float))
        return float(value)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
            self.fail(key, value, "a finite number above 0")
        assert isinstance(value, (int, float))
        return float(value)

"""The shape of a Llama 4 text model, read from a Hugging Face config.json.

Accepts what transformers 4 and 5 write: `rope_scaling` + `rope_theta` or `rope_parameters`, an
integer `attn_temperature_tuning`, an empty `no_rope_layers`. Fields that are absent have the
defaults of transformers' Llama4TextConfig, because save_pretrained leaves defaults out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from checkpoint.errors import CheckpointError, quoted
from checkpoint.generation_config import NO_DEFAULTS, SamplingDefaults, read_generation_config
from checkpoint.json_fields import Fields
from checkpoint.naming import ARCHITECTURES, Naming
from checkpoint.read_file import is_there, read_json

MODEL_TYPES = {"llama4_text": "Llama4ForCausalLM", "llama4": "Llama4ForConditionalGeneration"}
# Sizes beyond any model. Whoever only looks at one must not run out of memory, by a list of layers for instance.
MAX_LAYERS, MAX_EXPERTS = 4096, 65_536
DTYPES = ("bfloat16", "float16", "float32")
# Other names that transformers takes; float64 is computed as float32.
_DTYPES = (
    {name: name for name in DTYPES} | {"half": "float16"} | dict.fromkeys(("float", "float64", "double"), "float32")
)


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
class ModelConfig:
    """A Llama 4 text model. Sizes are element counts.

    intermediate_size: width of one routed expert and of the shared expert.
    intermediate_size_mlp: width of the MLP of dense layers.
    attention_chunk_size: tokens per attention chunk of chunked layers, absolute positions.
    floor_scale, attn_scale: NoPE layers multiply the query at position p by
        1 + attn_scale * ln(floor((p + 1) / floor_scale) + 1), if attn_temperature_tuning.
    dtype: empty if config.json names none. Then it is what most weights have: see Checkpoint.config.
    warnings: what was ignored, one line each.
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
    naming: Naming
    sampling_defaults: SamplingDefaults = NO_DEFAULTS
    warnings: tuple[str, ...] = ()

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
    if not is_there(path):
        raise CheckpointError(f"{path} is missing; a checkpoint is a Hugging Face Llama 4 directory")
    config = parse_config(read_json(path), str(path))
    generation = directory / "generation_config.json"
    if not is_there(generation):
        return config
    sampling, eos, warnings = read_generation_config(generation, config.vocab_size)
    config = replace(config, sampling_defaults=sampling, warnings=(*config.warnings, *warnings))
    return _with_end_tokens(config, eos, str(generation)) if eos else config


def parse_config(raw: Mapping[str, Any], source: str) -> ModelConfig:
    """Parse and validate the contents of a config.json. source: its path, for error messages."""
    top = Fields(raw, source)
    architecture, model_type = _architecture(top), str(raw.get("model_type") or "")
    # transformers goes by model_type; `architectures` may name any class.
    architecture = architecture if architecture in ARCHITECTURES else MODEL_TYPES.get(model_type, architecture)
    if architecture not in ARCHITECTURES or (model_type and model_type not in MODEL_TYPES):
        raise CheckpointError(
            f"{source}: architectures is {architecture!r:.100} and model_type {model_type!r:.100}; "
            f"Drover serves {' and '.join(ARCHITECTURES)}"
        )
    if quantization := top.get("quantization_config", dict, None):
        method = quantization.get("quant_method", "unknown")
        raise CheckpointError(
            f"{source}: quantization_config has quant_method {quoted(method)}; only {', '.join(DTYPES)} are supported"
        )
    # The text model's fields are nested where there may be vision, whatever class is named.
    nested = top.get("text_config", dict, None)
    text = top if nested is None else Fields(nested, f"{source}: text_config")

    num_layers = text.positive("num_hidden_layers", 48, most=MAX_LAYERS)
    hidden_size, num_heads = text.positive("hidden_size", 5120), text.positive("num_attention_heads", 40)
    num_kv_heads = text.positive("num_key_value_heads", 8)
    has_null_head_dim = "head_dim" in text.raw and text.raw["head_dim"] is None
    head_dim = max(hidden_size // num_heads, 1) if has_null_head_dim else text.positive("head_dim", 128)
    layers = _layers(text, num_layers)
    is_dense = not any(layer.is_moe for layer in layers)
    # A model without routed experts, such as Llama Guard 4, may say anything here.
    num_experts = 0 if is_dense else text.positive("num_local_experts", 16, most=MAX_EXPERTS)
    top_k = 0 if is_dense else text.positive("num_experts_per_tok", 1)
    if num_heads % num_kv_heads:
        text.fail("num_attention_heads", num_heads, f"a multiple of num_key_value_heads ({num_kv_heads})")
    if head_dim % 2:
        text.fail("head_dim", head_dim, "even, for rotary pairs")
    if top_k > num_experts:
        text.fail("num_experts_per_tok", top_k, f"at most num_local_experts ({num_experts})")
    if text.get("hidden_act", str, "silu") not in ("silu", "swish"):
        text.fail("hidden_act", text.raw["hidden_act"], "'silu' or 'swish', which are the same")
    if text.flag("attention_bias", False):
        text.fail("attention_bias", True, "false, as in every Llama 4")

    # transformers 5 writes `dtype`, 4 wrote `torch_dtype`; either level of a multimodal config may
    # carry it.
    dtype = next(
        (f.raw[key] for f in (text, top) for key in ("dtype", "torch_dtype") if f.raw.get(key) is not None), ""
    )
    if dtype and (not isinstance(dtype, str) or dtype not in _DTYPES):
        text.fail("dtype", dtype, f"one of {', '.join(DTYPES)}")
    rope_theta, rope_scaling = _rope(text)
    chunk = text.get("attention_chunk_size", int, 8192)
    max_positions = text.positive("max_position_embeddings", 131072)
    config = ModelConfig(
        vocab_size=text.positive("vocab_size", 202048),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=text.positive("intermediate_size", 8192),
        intermediate_size_mlp=text.positive("intermediate_size_mlp", 16384),
        num_experts=num_experts,
        experts_per_token=top_k,
        layers=layers,
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
        bos_token_id=_bos_token_id(text, top),
        eos_token_ids=text.token_ids("eos_token_id") or top.token_ids("eos_token_id", 2),
        dtype=_DTYPES[dtype] if dtype else "",
        naming=ARCHITECTURES[architecture],
    )
    return _with_end_tokens(replace(config, eos_token_ids=()), config.eos_token_ids, source)


def _bos_token_id(text: Fields, top: Fields) -> int | None:
    """None also where the vocabulary lacks it: transformers warns, and loads."""
    token_id = next(iter(text.token_ids("bos_token_id") or top.token_ids("bos_token_id", 1)), None)
    vocab_size = text.positive("vocab_size", 202048)
    return token_id if token_id is not None and 0 <= token_id < vocab_size else None


def _architecture(top: Fields) -> str:
    named = top.raw.get("architectures") or [""]
    named = [named] if isinstance(named, str) else top.get("architectures", list, None) or [""]
    return next((name for name in named if isinstance(name, str) and name in ARCHITECTURES), str(named[0]))


def _with_end_tokens(config: ModelConfig, token_ids: tuple[int, ...], source: str) -> ModelConfig:
    """The config with these end tokens, less those that its vocabulary lacks: no text can end with them.

    If it has none of them, the config's own go on to count.
    """
    possible = tuple(token_id for token_id in token_ids if 0 <= token_id < config.vocab_size)
    warnings = config.warnings
    if beyond := [token_id for token_id in token_ids if not 0 <= token_id < config.vocab_size]:
        text = f"{source}: eos_token_id {str(beyond)[1:-1]:.100} is ignored; vocab_size is {config.vocab_size}"
        warnings = (*warnings, text)
    return replace(config, eos_token_ids=possible or config.eos_token_ids, warnings=warnings)


def _layers(text: Fields, num_layers: int) -> tuple[LayerConfig, ...]:
    # `no_rope_layers` is inverted: 1 means that the layer uses RoPE. [] and null mean "derive".
    interval = text.positive("no_rope_layer_interval", 4)
    rope = text.get("no_rope_layers", list, None) or [int((i + 1) % interval != 0) for i in range(num_layers)]
    moe = text.get("moe_layers", list, None)
    if moe is None:
        step = text.positive("interleave_moe_layer_step", 1)
        moe = list(range(step - 1, num_layers, step))
    has_chunks = text.get("attention_chunk_size", int, 8192) is not None
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
    for index in moe:  # one beyond the last layer counts for nothing: the model was shortened
        if not isinstance(index, int):
            text.fail("moe_layers", index, "a layer index")
    is_moe = frozenset(moe)
    return tuple(
        LayerConfig(bool(rope[i]), has_chunks and types[i] == "chunked_attention", i in is_moe)
        for i in range(num_layers)
    )


def _rope(text: Fields) -> tuple[float, RopeScaling | None]:
    # transformers 5 folds rope_theta into rope_parameters; 4 had rope_theta beside rope_scaling.
    key = "rope_parameters" if text.raw.get("rope_parameters") else "rope_scaling"
    rope = Fields(text.get(key, dict, None) or {}, f"{text.source}: {key}")
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

"""What a checkpoint's generation_config.json proposes for requests: how to sample, and which tokens end a text."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.errors import CheckpointError, quoted
from checkpoint.json_fields import Fields
from checkpoint.read_file import read_json

MAX_STOPS, MAX_BIASES, MAX_BIAS = 16, 1024, 100.0  # what a request may give
# What transformers' `generate` does by these fields and Drover does not; each with the value that changes nothing.
# How many answers there are is for the request to say.
_NOT_DONE: dict[str, Any] = {
    "num_return_sequences": 1,
    "num_beams": 1,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
    "penalty_alpha": None,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
    "encoder_repetition_penalty": 1.0,
}


@dataclass(frozen=True)
class SamplingDefaults:
    """Defaults from generation_config.json for parameters that a request leaves out.

    Units as in inference.proto.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()


NO_DEFAULTS = SamplingDefaults()


def read_generation_config(path: Path, vocab_size: int) -> tuple[SamplingDefaults, tuple[int, ...], tuple[str, ...]]:
    """(sampling defaults, end tokens, warnings) of the file at `path`.

    It never keeps a checkpoint from being served: what cannot be used is ignored, with a warning.
    `do_sample` is ignored without one, for it only matters to transformers' own `generate`.
    """
    try:
        fields = Fields(read_json(path), str(path))
    except CheckpointError as error:
        return NO_DEFAULTS, (), (f"{error}; it is ignored",)
    warnings: list[str] = []

    def read(field: str, parse: Callable[[], Any], default: Any) -> Any:
        try:
            return default if fields.raw.get(field) is None else parse()
        except CheckpointError as error:
            warnings.append(f"{error}; it is ignored")
            return default

    # Released checkpoints list all three end tokens only here.
    eos = read("eos_token_id", lambda: fields.token_ids("eos_token_id"), ())
    sampling = SamplingDefaults(
        temperature=read("temperature", lambda: fields.between("temperature", 0, 100), 1.0),
        top_p=read("top_p", lambda: fields.between("top_p", 1e-6, 1), 1.0),
        top_k=max(0, read("top_k", lambda: fields.whole("top_k", -1, 2**31 - 1), 0)),  # -1, too, keeps all
        min_p=read("min_p", lambda: fields.between("min_p", 0, 1), 0.0),
        repetition_penalty=read("repetition_penalty", lambda: fields.between("repetition_penalty", 1e-6, 1e6), 1.0),
        max_tokens=read("max_new_tokens", lambda: fields.whole("max_new_tokens", 1, 2**31 - 1), None),
        min_tokens=read("min_new_tokens", lambda: fields.whole("min_new_tokens", 0, 2**31 - 1), 0),
        presence_penalty=read("presence_penalty", lambda: fields.between("presence_penalty", -2, 2), 0.0),
        frequency_penalty=read("frequency_penalty", lambda: fields.between("frequency_penalty", -2, 2), 0.0),
        logit_bias=read("sequence_bias", lambda: _biases(fields, vocab_size), ())
        or read("suppress_tokens", lambda: _suppressed(fields, vocab_size), ()),
        stop=read("stop_strings", lambda: _stop_strings(fields), ()),
    )
    if fields.raw.get("sequence_bias") and fields.raw.get("suppress_tokens"):
        warnings.append(f"{fields.source}: suppress_tokens is ignored beside sequence_bias")
    warnings += [
        f"{fields.source}: {field} is {quoted(fields.raw[field])}, which Drover does not do; it is ignored"
        for field, without_effect in _NOT_DONE.items()
        if fields.raw.get(field) not in (None, without_effect)
    ]
    return sampling, eos, tuple(warnings)


def _biases(fields: Fields, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """transformers' [[[token id], bias], ...]; a bias of several tokens in a row is none of Drover's."""
    found: dict[int, float] = {}
    for entry in fields.get("sequence_bias", list, None):
        match entry:
            case [[int(token_id)], float() | int() as bias] if (
                not isinstance(token_id, bool) and 0 <= token_id < vocab_size and -MAX_BIAS <= bias <= MAX_BIAS
            ):
                found[token_id] = float(bias)
            case _:
                fields.fail("sequence_bias", entry, f"[[token id], bias], with a bias from {-MAX_BIAS} to {MAX_BIAS}")
    return _few(fields, "sequence_bias", found)


def _suppressed(fields: Fields, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """A bias of -100 bans a token."""
    token_ids = fields.token_ids("suppress_tokens")
    if wrong := [token_id for token_id in token_ids if not 0 <= token_id < vocab_size]:
        fields.fail("suppress_tokens", wrong[0], f"from 0 to {vocab_size - 1}")
    return _few(fields, "suppress_tokens", dict.fromkeys(token_ids, -MAX_BIAS))


def _few(fields: Fields, key: str, biases: dict[int, float]) -> tuple[tuple[int, float], ...]:
    if len(biases) > MAX_BIASES:
        fields.fail(key, fields.raw[key], f"a list of at most {MAX_BIASES} entries")
    return tuple(sorted(biases.items()))


def _stop_strings(fields: Fields) -> tuple[str, ...]:
    value = fields.raw["stop_strings"]
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        fields.fail("stop_strings", value, f"a text, or a list of at most {MAX_STOPS}")
    for stop in stops:
        if not isinstance(stop, str) or not 1 <= len(stop) <= 256:
            fields.fail("stop_strings", stop, "a text of 1 to 256 characters")
    return tuple(stops)

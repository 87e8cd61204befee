"""What generation_config.json proposes counts; what cannot be used is ignored with a warning, and never refused."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from checkpoint.config import ModelConfig, parse_config, read_config
from checkpoint.generation_config import MAX_BIAS, MAX_BIASES, MAX_STOPS, SamplingDefaults, read_generation_config
from frontend.answer_params import MAX_ENTRIES
from frontend.model_card import ModelCard
from router.request import MAX_BIAS as MAX_BIAS_OF_A_REQUEST
from router.request import GenerationRequest, RequestLimits, SamplingParams, check_request

TEXT: dict[str, Any] = {"architectures": ["Llama4ForCausalLM"], "num_hidden_layers": 4}


def test_a_generation_config_proposes_how_to_sample(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TEXT))
    assert read_config(tmp_path).sampling_defaults == SamplingDefaults(temperature=1.0, top_p=1.0, top_k=0)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "top_k": None}))
    assert read_config(tmp_path).sampling_defaults == SamplingDefaults(temperature=0.6, top_p=0.9, top_k=0)


def with_generation(directory: Path, **fields: object) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(TEXT))
    (directory / "generation_config.json").write_text(json.dumps(fields))
    return read_config(directory)


def test_every_sampling_field_of_a_generation_config_counts(tmp_path: Path) -> None:
    given = {"temperature": 0.5, "top_p": 0.8, "top_k": -1, "min_p": 0.1, "repetition_penalty": 1.2}
    config = with_generation(tmp_path, **given, max_new_tokens=50, min_new_tokens=3)
    assert config.sampling_defaults == SamplingDefaults(0.5, 0.8, 0, 0.1, 1.2, 50, 3)
    assert config.warnings == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", 2.5),
        ("top_k", -2),
        ("min_p", 7),
        ("repetition_penalty", 0),
        ("eos_token_id", "</s>"),
    ],
)
def test_nonsense_in_a_generation_config_is_ignored_with_a_warning(tmp_path: Path, field: str, value: object) -> None:
    config = with_generation(tmp_path, **{field: value})
    assert config.sampling_defaults == SamplingDefaults()
    assert config.eos_token_ids == (2,)
    [warning] = config.warnings
    assert f"generation_config.json: {field} is {value!r}; it must be" in warning
    assert warning.endswith("; it is ignored")


def test_end_tokens_that_the_vocabulary_lacks_are_ignored_with_a_warning(tmp_path: Path) -> None:
    config = with_generation(tmp_path, eos_token_id=[5, 202_048, -1, 7])
    assert config.eos_token_ids == (5, 7)
    [warning] = config.warnings
    assert "generation_config.json: eos_token_id 202048, -1 is ignored; vocab_size is 202048" in warning


def test_where_no_end_token_is_in_the_vocabulary_those_of_the_config_count(tmp_path: Path) -> None:
    config = with_generation(tmp_path, eos_token_id=[999_999])
    assert config.eos_token_ids == (2,)
    assert len(config.warnings) == 1
    alone = parse_config(TEXT | {"eos_token_id": 300_000}, "config.json")
    assert (alone.eos_token_ids, len(alone.warnings)) == ((), 1)


def test_fields_of_transformers_that_a_request_has_by_another_name(tmp_path: Path) -> None:
    bias = [[[5], -2.5], [[3], 1]]
    config = with_generation(
        tmp_path, stop_strings=["END", "."], sequence_bias=bias, presence_penalty=0.5, frequency_penalty=-1
    )
    assert config.warnings == ()
    defaults = config.sampling_defaults
    assert (defaults.stop, defaults.logit_bias) == (("END", "."), ((3, 1.0), (5, -2.5)))
    card = ModelCard.of("m", config, "float32")
    assert (card.default_stop, card.default_sampling.logit_bias) == (defaults.stop, defaults.logit_bias)
    assert (card.default_sampling.presence_penalty, card.default_sampling.frequency_penalty) == (0.5, -1.0)
    assert with_generation(tmp_path, stop_strings="END").sampling_defaults.stop == ("END",)
    suppressed = with_generation(tmp_path, suppress_tokens=[7, 4]).sampling_defaults
    assert suppressed.logit_bias == ((4, -MAX_BIAS), (7, -MAX_BIAS))


def test_no_more_is_taken_than_from_a_request() -> None:
    assert {"stop": MAX_STOPS, "logit_bias": MAX_BIASES}.items() <= MAX_ENTRIES.items()
    assert MAX_BIAS == MAX_BIAS_OF_A_REQUEST


NOT_USED: list[tuple[str, object]] = [
    ("stop_strings", 7),
    ("stop_strings", [""]),
    ("stop_strings", ["x"] * 17),
    ("sequence_bias", [[[1, 2], 5.0]]),
    ("sequence_bias", [[[1], 500.0]]),
    ("sequence_bias", {"a": 1}),
    ("suppress_tokens", [10**9]),
    ("suppress_tokens", list(range(2000))),
    ("presence_penalty", 3),
    ("temperature", float("nan")),
    ("top_k", float("inf")),
    ("num_return_sequences", 4),
    ("num_beams", 2),
    ("bad_words_ids", [[1]]),
]


@pytest.mark.parametrize(("field", "value"), NOT_USED)
def test_what_cannot_be_used_is_ignored_with_one_warning(tmp_path: Path, field: str, value: object) -> None:
    config = with_generation(tmp_path, **{field: value})
    assert config.sampling_defaults == SamplingDefaults()
    [warning] = config.warnings
    assert f"generation_config.json: {field} is " in warning
    assert warning.endswith("; it is ignored")
    assert len(warning) < 600


def test_what_transformers_writes_needs_no_warning(tmp_path: Path) -> None:
    """All fields of transformers with the values that change nothing."""
    assert with_generation(tmp_path, **GenerationConfig().to_dict()).warnings == ()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"temperature": ' + b"9" * 10_000 + b"}"])
def test_a_damaged_file_is_ignored_with_one_warning(tmp_path: Path, content: bytes) -> None:
    with_generation(tmp_path)
    (tmp_path / "generation_config.json").write_bytes(content)
    config = read_config(tmp_path)
    assert config.sampling_defaults == SamplingDefaults()
    [warning] = config.warnings
    assert "generation_config.json" in warning
    assert warning.endswith("; it is ignored")


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just(10**4000)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2))
FIELDS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens", "min_new_tokens"]
FIELDS += ["presence_penalty", "frequency_penalty", "sequence_bias", "suppress_tokens", "stop_strings", "eos_token_id"]


@pytest.mark.parametrize("field", [*FIELDS, "num_beams"])
def test_any_value_of_any_field_can_be_served(field: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("any") / "generation_config.json"

    @settings(max_examples=20, database=None)
    @given(VALUES)
    def holds(value: object) -> None:
        path.write_text(json.dumps({field: value}))
        defaults, end_tokens, warnings = read_generation_config(path, 500)
        assert all(warning.isprintable() and len(warning) < 600 for warning in warnings)
        sampling = {name: one for name, one in asdict(defaults).items() if name != "stop" and one is not None}
        request = GenerationRequest("a", (1,), SamplingParams(**{"max_tokens": 1, **sampling}))
        if request.sampling.min_tokens <= request.sampling.max_tokens < 2**20:
            check_request(request, RequestLimits(500, 2**21))
        assert all(isinstance(token_id, int) for token_id in end_tokens)

    holds()

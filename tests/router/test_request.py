"""Every field of a request, just inside its bounds and just outside."""

import math
import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from router.errors import InvalidArgument, Unavailable
from router.request import (
    MAX_LOGPROBS,
    FinishReason,
    GenerationRequest,
    RequestLimits,
    SamplingParams,
    TokenDelta,
    check_request,
)

LIMITS = RequestLimits(vocab_size=100, max_context_tokens=20)


def check(prompt: Sequence[int] = (1, 2, 3), **sampling: Any) -> None:
    check_request(GenerationRequest("id", tuple(prompt), replace(SamplingParams(max_tokens=5), **sampling)), LIMITS)


VALID: list[dict[str, Any]] = [
    {},
    {"prompt": (0, 99)},
    {"prompt": range(19), "max_tokens": 1},
    {"max_tokens": 1},
    {"max_tokens": 17},
    {"temperature": 0.0},
    {"temperature": -0.0},
    {"temperature": 1e-300},
    {"temperature": 100.0},
    {"top_p": 1e-300},
    {"top_p": 1.0},
    {"top_k": 0},
    {"top_k": 2**63},
    {"seed": 0},
    {"seed": 2**64 - 1},
    {"stop_token_ids": frozenset({0, 99})},
    {"logprobs": None},
    {"logprobs": 0},
    {"logprobs": MAX_LOGPROBS},
    {"min_p": 0.0},
    {"min_p": 1.0},
    {"presence_penalty": -2.0, "frequency_penalty": 2.0},
    {"presence_penalty": 2.0, "frequency_penalty": -2.0},
    {"repetition_penalty": 1e-300},
    {"repetition_penalty": 1e300},
    {"logit_bias": ((0, -100.0), (99, 100.0))},
    {"min_tokens": 0},
    {"min_tokens": 5},
    {"ignore_eos": True},
    {"prompt_logprobs": 0},
    {"prompt_logprobs": MAX_LOGPROBS},
]

INVALID: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": ()}, "prompt", "is empty"),
    ({"prompt": (5, 100)}, "token_ids", "contains 100; token ids go from 0 to 99"),
    ({"prompt": (-1,)}, "token_ids", "contains -1"),
    ({"prompt": range(20), "max_tokens": 1}, "prompt", "has 20 tokens; the context holds 20"),
    ({"max_tokens": 0}, "max_tokens", "is 0; must be at least 1"),
    ({"max_tokens": -3}, "max_tokens", "is -3"),
    ({"max_tokens": 18}, "max_tokens", "is 18; with a prompt of 3 tokens at most 17 fit"),
    ({"temperature": -0.1}, "temperature", "is -0.1; must be from 0"),
    ({"temperature": 100.1}, "temperature", "is 100.1"),
    ({"temperature": math.nan}, "temperature", "is nan"),
    ({"temperature": math.inf}, "temperature", "is inf"),
    ({"temperature": -math.inf}, "temperature", "is -inf"),
    ({"top_p": 0.0}, "top_p", "is 0; must be above 0 and at most 1"),
    ({"top_p": -0.5}, "top_p", "is -0.5"),
    ({"top_p": 1.001}, "top_p", "is 1.001"),
    ({"top_p": math.nan}, "top_p", "is nan"),
    ({"top_p": math.inf}, "top_p", "is inf"),
    ({"top_k": -1}, "top_k", "is -1; must be 0"),
    ({"seed": -1}, "seed", "is -1; must be from 0 to 2^64-1"),
    ({"seed": 2**64}, "seed", "is 18446744073709551616"),
    ({"stop_token_ids": frozenset({3, 100})}, "stop_token_ids", "contains 100"),
    ({"stop_token_ids": frozenset({-1})}, "stop_token_ids", "contains -1"),
    ({"logprobs": -1}, "logprobs", "is -1; must be from 0 to 20"),
    ({"logprobs": 21}, "logprobs", "is 21"),
    ({"min_p": -0.1}, "min_p", "is -0.1; must be from 0 (keep all) to 1"),
    ({"min_p": 1.1}, "min_p", "is 1.1"),
    ({"min_p": math.nan}, "min_p", "is nan"),
    ({"presence_penalty": 2.1}, "presence_penalty", "is 2.1; must be from -2 to 2"),
    ({"presence_penalty": -2.1}, "presence_penalty", "is -2.1"),
    ({"presence_penalty": math.nan}, "presence_penalty", "is nan"),
    ({"frequency_penalty": 2.1}, "frequency_penalty", "is 2.1; must be from -2 to 2"),
    ({"frequency_penalty": -math.inf}, "frequency_penalty", "is -inf"),
    ({"repetition_penalty": 0.0}, "repetition_penalty", "is 0; must be above 0 and finite"),
    ({"repetition_penalty": -1.0}, "repetition_penalty", "is -1"),
    ({"repetition_penalty": math.inf}, "repetition_penalty", "is inf"),
    ({"repetition_penalty": math.nan}, "repetition_penalty", "is nan"),
    ({"logit_bias": ((100, 1.0),)}, "logit_bias", "contains 100; token ids go from 0 to 99"),
    ({"logit_bias": ((5, 101.0),)}, "logit_bias", "gives token 5 a bias of 101; must be from -100 to 100"),
    ({"logit_bias": ((5, math.nan),)}, "logit_bias", "gives token 5 a bias of nan"),
    ({"logit_bias": ((5, 1.0),) * 1025}, "logit_bias", "has 1025 entries; at most 1024 are taken"),
    ({"min_tokens": -1}, "min_tokens", "is -1; must be from 0 to max_tokens, 5"),
    ({"min_tokens": 6}, "min_tokens", "is 6; must be from 0 to max_tokens, 5"),
    ({"prompt_logprobs": -1}, "prompt_logprobs", "is -1; must be from 0 to 20"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "is 21"),
]


@pytest.mark.parametrize("fields", VALID, ids=str)
def test_values_within_bounds_pass(fields: dict[str, Any]) -> None:
    check(**fields)


@pytest.mark.parametrize(("fields", "field", "message"), INVALID, ids=str)
def test_a_value_out_of_bounds_is_refused_by_name_and_value(fields: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        check(**fields)
    assert error.value.field == field
    assert str(error.value).startswith(f"{field}: {message}")


def test_every_sampling_field_is_checked() -> None:
    """A field that is added to SamplingParams needs a line in each table above; every bool is valid."""
    checked = {field for _, field, _ in INVALID}
    assert set(SamplingParams.__dataclass_fields__) - {"ignore_eos"} <= checked


@pytest.mark.parametrize(("prompt_tokens", "top", "fits"), [(2**16, 15, True), (2**16 + 1, 15, False)])
def test_the_log_probabilities_of_a_long_prompt_are_limited(prompt_tokens: int, top: int, fits: bool) -> None:
    limits = RequestLimits(vocab_size=100, max_context_tokens=2**20)
    request = GenerationRequest("id", (1,) * prompt_tokens, SamplingParams(5, prompt_logprobs=top))
    if fits:
        check_request(request, limits)
        return
    with pytest.raises(InvalidArgument, match=r"65537 x \(15 \+ 1\) = 1048592 .* at most 1048576") as error:
        check_request(request, limits)
    assert error.value.field == "prompt_logprobs"


@pytest.mark.parametrize(
    ("delta", "is_last"),
    [
        (TokenDelta("id", (5,)), False),
        (TokenDelta("id", (5,), finish_reason=FinishReason.STOP), True),
        (TokenDelta("id", error=Unavailable("gone")), True),
    ],
    ids=["token", "finish", "error"],
)
def test_a_finish_reason_or_an_error_ends_a_request(delta: TokenDelta, is_last: bool) -> None:
    assert delta.is_last is is_last


def test_an_error_keeps_its_field_when_it_travels_in_a_delta() -> None:
    error = InvalidArgument("top_p", "is 2")
    copy = pickle.loads(pickle.dumps(TokenDelta("id", error=error))).error
    assert (type(copy), copy.field, str(copy)) == (InvalidArgument, "top_p", "top_p: is 2")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ((1, 2, 3, 4), None),
        ((1, 2, 3, 4, 5), "made: has 5 tokens; max_tokens is 5, so nothing is left to make"),
        ((1, 100), "made: contains 100; token ids go from 0 to 99"),
    ],
    ids=["one left", "none left", "no token"],
)
def test_what_was_made_leaves_something_to_make(made: tuple[int, ...], message: str | None) -> None:
    request = GenerationRequest("id", (1,), SamplingParams(max_tokens=5), made=made)
    if message is None:
        check_request(request, LIMITS)
        return
    with pytest.raises(InvalidArgument) as error:
        check_request(request, LIMITS)
    assert (error.value.field, str(error.value)) == ("made", message)


@pytest.mark.parametrize("timeout_s", [None, 1e-9, 1e9])
def test_a_timeout_is_any_time_from_now(timeout_s: float | None) -> None:
    check_request(GenerationRequest("id", (1,), SamplingParams(max_tokens=5), timeout_s), LIMITS)


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, math.inf, math.nan])
def test_a_timeout_that_is_no_time_is_refused(timeout_s: float) -> None:
    with pytest.raises(InvalidArgument, match=r"^timeout_s: is .*; must be above 0 and finite"):
        check_request(GenerationRequest("id", (1,), SamplingParams(max_tokens=5), timeout_s), LIMITS)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"stop_token_ids": frozenset({7})}, "made: contains 7 at index 1, which ends the completion"),
        ({"stop_token_ids": frozenset({7}), "ignore_eos": True}, "made: contains 7 at index 1"),
        ({"stop_token_ids": frozenset({9})}, "made: contains 4 at index 2"),
        ({"stop_token_ids": frozenset({9}), "ignore_eos": True}, None),
    ],
    ids=["stop token", "stop token without end tokens", "end token", "ignored end token"],
)
def test_what_was_made_has_not_ended(sampling: dict[str, Any], message: str | None) -> None:
    limits = replace(LIMITS, eos_token_ids=frozenset({4, 8}))
    request = GenerationRequest("id", (4, 7), SamplingParams(max_tokens=5, **sampling), made=(3, 7, 4))
    if message is None:
        check_request(request, limits)
        return
    with pytest.raises(InvalidArgument) as error:
        check_request(request, limits)
    assert error.value.field == "made"
    assert str(error.value).startswith(message)

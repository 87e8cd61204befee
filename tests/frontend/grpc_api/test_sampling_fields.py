"""The wire's parameters as generation's, and generation's field names as the wire's paths."""

from dataclasses import fields, replace

import pytest

from frontend.answer_params import AnswerParams
from frontend.grpc_api.sampling_fields import answer_params, wire_path
from protos.drover.v1 import inference_pb2 as pb


@pytest.mark.parametrize(
    ("field", "path"),
    [
        ("max_tokens", "sampling.max_tokens"),
        ("stop[2]", "sampling.stop[2]"),
        ("n", "sampling.n"),
        ("text", "prompt.text"),
        ("token_ids", "prompt.token_ids"),
        ("prompt", "prompt"),
        ("messages[0].content", "messages[0].content"),
        ("timeout_s", "timeout_s"),
    ],
)
def test_every_name_has_one_path(field: str, path: str) -> None:
    assert wire_path(field) == path


def test_every_parameter_of_the_wire_is_one_of_generations() -> None:
    on_the_wire = {field.name for field in pb.SamplingParams.DESCRIPTOR.fields} | {"timeout_s"}
    assert on_the_wire == {field.name for field in fields(AnswerParams)}


def test_what_is_left_out_is_none_and_a_zero_is_not() -> None:
    nothing = AnswerParams(stop_token_ids=(), logit_bias={})
    assert answer_params(pb.GenerateRequest()) == nothing
    zeros = pb.SamplingParams(temperature=0, top_k=0, seed=0, ignore_eos=False, n=0)
    assert answer_params(pb.ChatRequest(sampling=zeros, timeout_s=0)) == replace(
        nothing, temperature=0.0, top_k=0, seed=0, ignore_eos=False, n=0, timeout_s=0.0
    )


def test_everything_that_is_given_is_passed_on() -> None:
    sampling = pb.SamplingParams(max_tokens=9, stop=["x", "yy"], stop_token_ids=[3, 1], logit_bias={9: 1, 2: -3})
    params = answer_params(pb.GenerateRequest(sampling=sampling, timeout_s=2.5))
    assert params == AnswerParams(
        max_tokens=9, stop=("x", "yy"), stop_token_ids=(3, 1), logit_bias={9: 1.0, 2: -3.0}, timeout_s=2.5
    )

"""Field names and sampling fields of drover.v1, translated from and to those of
frontend/generation.py."""

from typing import Any

from frontend.answer_params import MAX_ENTRIES, AnswerParams, check_lengths
from protos.drover.v1 import inference_pb2 as pb

_SAMPLING = pb.SamplingParams.DESCRIPTOR.fields_by_name
_PROMPT = tuple(field.name for field in pb.GenerateRequest.DESCRIPTOR.oneofs_by_name["prompt"].fields)


def wire_path(field: str) -> str:
    """The path in GenerateRequest or ChatRequest of a field that an error names:
    "sampling.stop[2]" for "stop[2]"."""
    name = field.partition("[")[0]
    if name in _SAMPLING:
        return f"sampling.{field}"
    return f"prompt.{field}" if name in _PROMPT else field


def answer_params(request: pb.GenerateRequest | pb.ChatRequest) -> AnswerParams:
    """The request's parameters; None for a field that was left out.

    Raises InvalidArgument for a list that is too long, before it takes the time to read it.
    """
    sampling = request.sampling
    check_lengths({name: getattr(sampling, name) for name in MAX_ENTRIES})
    given: dict[str, Any] = {field.name: value for field, value in sampling.ListFields() if not field.is_repeated}
    return AnswerParams(
        **given,
        stop=tuple(sampling.stop),
        stop_token_ids=tuple(sampling.stop_token_ids),
        logit_bias=dict(sampling.logit_bias),
        timeout_s=request.timeout_s if request.HasField("timeout_s") else None,
    )

"""What a client sends and gets, as plain frozen dataclasses; fields are those of drover/v1/inference.proto."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

from protos.drover.v1 import inference_pb2 as pb


class Message(NamedTuple):
    """One turn of a conversation; a plain (role, content) tuple does as well.

    role: "system", "user", "assistant" or "tool".
    """

    role: str
    content: str


class Sampling(TypedDict, total=False):
    """Keyword arguments of generate and chat; what is left out, or None, takes the server's default."""

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    stop_token_ids: Sequence[int]
    logprobs: int | None


@dataclass(frozen=True)
class TokenAlternative:
    """A token that could have stood in a place, and its natural log-probability there."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token made, and the most likely tokens in its place, most likely first."""

    token_id: int
    logprob: float
    top: tuple[TokenAlternative, ...]


@dataclass(frozen=True)
class Usage:
    """How many tokens a request took."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Delta:
    """What was made since the last delta of the stream.

    finish_reason ("stop" or "length") and usage are set in the last one only. logprobs is empty unless asked for.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str | None
    usage: Usage | None


@dataclass(frozen=True)
class ModelInfo:
    """What is served, and its limits."""

    model: str
    vocab_size: int
    max_context_tokens: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    num_layers: int
    num_moe_layers: int
    num_experts: int
    experts_per_token: int
    total_parameters: int
    active_parameters: int
    dtype: str
    has_chat_template: bool


def delta_of(response: pb.GenerateResponse) -> Delta:
    """The message as a Delta."""
    finished = response.finish_reason != pb.FINISH_REASON_UNSPECIFIED
    return Delta(
        request_id=response.request_id,
        text=response.text,
        token_ids=tuple(response.token_ids),
        logprobs=tuple(
            TokenLogprob(
                entry.token_id,
                entry.logprob,
                tuple(TokenAlternative(top.token_id, top.logprob) for top in entry.top),
            )
            for entry in response.logprobs
        ),
        finish_reason=_finish_reason(response.finish_reason) if finished else None,
        usage=Usage(response.usage.prompt_tokens, response.usage.completion_tokens) if finished else None,
    )


def model_info_of(response: pb.GetModelInfoResponse) -> ModelInfo:
    """The message as a ModelInfo."""
    return ModelInfo(
        model=response.model,
        vocab_size=response.vocab_size,
        max_context_tokens=response.max_context_tokens,
        eos_token_ids=tuple(response.eos_token_ids),
        bos_token_id=response.bos_token_id if response.HasField("bos_token_id") else None,
        num_layers=response.num_layers,
        num_moe_layers=response.num_moe_layers,
        num_experts=response.num_experts,
        experts_per_token=response.experts_per_token,
        total_parameters=response.total_parameters,
        active_parameters=response.active_parameters,
        dtype=response.dtype,
        has_chat_template=response.has_chat_template,
    )


def _finish_reason(value: pb.FinishReason) -> str:
    return pb.FinishReason.Name(value).removeprefix("FINISH_REASON_").lower()

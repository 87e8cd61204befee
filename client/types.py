"""Requests and answers as plain frozen dataclasses. Fields are those of drover/v1/inference.proto."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

from protos.drover.v1 import inference_pb2 as pb


class Message(NamedTuple):
    """One turn of a conversation. A plain (role, content) tuple works, too.

    role: "system", "user", "assistant" or "tool".
    """

    role: str
    content: str


class Sampling(TypedDict, total=False):
    """Keyword arguments of `generate` and `chat`.

    Missing ones, and None, mean the server's default.
    """

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    stop_token_ids: Sequence[int]
    logprobs: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float]
    min_tokens: int | None
    stop: Sequence[str]
    ignore_eos: bool | None
    n: int | None
    prompt_logprobs: int | None


@dataclass(frozen=True)
class TokenAlternative:
    """An alternative token at a position, and its natural log-probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a generated token, and the most likely tokens there, likeliest first."""

    token_id: int
    logprob: float
    top: tuple[TokenAlternative, ...]


@dataclass(frozen=True)
class PromptLogprob:
    """The log-probability of a prompt token (None for the first), and the most likely tokens
    there."""

    token_id: int
    logprob: float | None
    top: tuple[TokenAlternative, ...]


@dataclass(frozen=True)
class Usage:
    """Tokens of an answer.

    cached_tokens: prompt tokens found in the prefix cache, which were not computed again.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class Delta:
    """The continuation of one answer since its last delta.

    index: number of the answer, below n.
    finish_reason ("stop" or "length") and usage: only in the last delta of each answer.
    stop_string, stop_token_id: what stopped the answer, also in its last delta; at most one is set.
    logprobs, prompt_logprobs: empty unless asked for. prompt_logprobs arrive in parts, with the
    deltas of answer 0.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str | None
    usage: Usage | None
    index: int = 0
    prompt_logprobs: tuple[PromptLogprob, ...] = ()
    stop_string: str | None = None
    stop_token_id: int | None = None


@dataclass(frozen=True)
class ModelInfo:
    """The served model and its limits."""

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
            TokenLogprob(entry.token_id, entry.logprob, _alternatives(entry)) for entry in response.logprobs
        ),
        finish_reason=_finish_reason(response.finish_reason) if finished else None,
        usage=_usage(response.usage) if finished else None,
        index=response.index,
        prompt_logprobs=tuple(
            PromptLogprob(entry.token_id, entry.logprob if entry.HasField("logprob") else None, _alternatives(entry))
            for entry in response.prompt_logprobs
        ),
        stop_string=response.stop_string if response.HasField("stop_string") else None,
        stop_token_id=response.stop_token_id if response.HasField("stop_token_id") else None,
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


def _alternatives(entry: pb.TokenLogprob | pb.PromptLogprob) -> tuple[TokenAlternative, ...]:
    return tuple(TokenAlternative(top.token_id, top.logprob) for top in entry.top)


def _usage(usage: pb.Usage) -> Usage:
    return Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)


def _finish_reason(value: pb.FinishReason) -> str:
    return pb.FinishReason.Name(value).removeprefix("FINISH_REASON_").lower()

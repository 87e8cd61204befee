"""A request as the router sees it, its limits, and the token deltas that answer it. Plain data, so it can travel."""

from dataclasses import dataclass
from enum import Enum

from router.errors import InvalidArgument

MAX_LOGPROBS = 20
MAX_TEMPERATURE = 100.0
DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True)
class SamplingParams:
    """How to choose each token. Fields are those of `SamplingParams` in inference.proto, defaults resolved.

    top_k 0 keeps all tokens. logprobs None returns none; n returns the chosen token's and the n most likely ones'.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to continue. request_id is unique among all requests of a server.

    timeout_s: how long its client waits, from now on; none means for ever.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    timeout_s: float | None = None


class FinishReason(str, Enum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities at one place: the chosen token's, then (id, logprob) of the most likely ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class TokenDelta:
    """What one step added to one request.

    token_ids and logprobs have the same length (logprobs is empty unless asked for). The last delta of a request has
    either finish_reason or error set; an error is an instance of RequestError.
    cached_tokens: prompt tokens that did not have to be computed; told with the request's first token.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    cached_tokens: int = 0

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass(frozen=True)
class RequestLimits:
    """What a router can take. max_context_tokens: prompt and completion together."""

    vocab_size: int
    max_context_tokens: int


def check_request(request: GenerationRequest, limits: RequestLimits) -> None:
    """Raise InvalidArgument, naming the .proto field, unless the router can take `request`."""
    sampling, prompt = request.sampling, request.prompt_token_ids
    if not prompt:
        raise InvalidArgument("prompt", "is empty; give at least one token of text or token_ids")
    _check_token_ids("prompt.token_ids", prompt, limits.vocab_size)
    if len(prompt) >= limits.max_context_tokens:
        raise InvalidArgument(
            "prompt",
            f"has {len(prompt)} tokens; the context holds {limits.max_context_tokens}, prompt and completion together",
        )
    if sampling.max_tokens < 1:
        raise InvalidArgument("sampling.max_tokens", f"is {sampling.max_tokens}; must be at least 1")
    if len(prompt) + sampling.max_tokens > limits.max_context_tokens:
        raise InvalidArgument(
            "sampling.max_tokens",
            f"is {sampling.max_tokens}; with a prompt of {len(prompt)} tokens at most "
            f"{limits.max_context_tokens - len(prompt)} fit into the context of {limits.max_context_tokens}",
        )
    if not (0.0 <= sampling.temperature <= MAX_TEMPERATURE):  # false for NaN, too
        raise InvalidArgument(
            "sampling.temperature", f"is {sampling.temperature:g}; must be from 0 (greedy) to {MAX_TEMPERATURE:g}"
        )
    if not (0.0 < sampling.top_p <= 1.0):
        raise InvalidArgument("sampling.top_p", f"is {sampling.top_p:g}; must be above 0 and at most 1")
    if sampling.top_k < 0:
        raise InvalidArgument("sampling.top_k", f"is {sampling.top_k}; must be 0 (keep all) or more")
    if not 0 <= sampling.seed < 2**64:
        raise InvalidArgument("sampling.seed", f"is {sampling.seed}; must be from 0 to 2^64-1")
    _check_token_ids("sampling.stop_token_ids", tuple(sampling.stop_token_ids), limits.vocab_size)
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= MAX_LOGPROBS:
        raise InvalidArgument("sampling.logprobs", f"is {sampling.logprobs}; must be from 0 to {MAX_LOGPROBS}")


def _check_token_ids(field: str, token_ids: tuple[int, ...], vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidArgument(field, f"contains {token_id}; token ids go from 0 to {vocab_size - 1}")

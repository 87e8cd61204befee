"""A request as the router sees it, its limits, and the token deltas that answer it.

Plain data, so it can travel.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from checkpoint.config import ModelConfig
from router.errors import InvalidArgument

MAX_LOGPROBS = 20
MAX_TEMPERATURE = 100.0
MAX_PENALTY = 2.0  # of presence and frequency, either sign
MAX_BIAS = 100.0  # either sign
MAX_BIASED_TOKENS = 1024
# Log-probabilities of a prompt, the tokens' own and the alternatives together: about 100 MB of
# Python objects.
MAX_PROMPT_LOGPROB_ENTRIES = 2**20
DEFAULT_MAX_TOKENS = 256

# Why a frontend sends a request again: its router's process ended, was silent for too long, or said
# that it cannot go on; or its client came back, after it had lost the connection.
LOST, SILENT, UNAVAILABLE, RESUMED = "lost", "silent", "unavailable", "resumed"
REPLAY_REASONS = (LOST, SILENT, UNAVAILABLE, RESUMED)


@dataclass(frozen=True)
class SamplingParams:
    """How to choose each token.

    Fields are those of `SamplingParams` in inference.proto, defaults resolved.

    top_k 0 keeps all tokens. logprobs None returns none; n returns the chosen token's and the n
    most likely ones'. prompt_logprobs is the same for the prompt's tokens. logit_bias: (token id,
    bias) pairs, each token once. What is about text or about several answers (stop, n) is for the
    frontend alone.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    prompt_logprobs: int | None = None

    def ending_token_ids(self, eos_token_ids: Iterable[int]) -> frozenset[int]:
        """The tokens that end a completion. eos_token_ids: the model's."""
        return self.stop_token_ids if self.ignore_eos else self.stop_token_ids.union(eos_token_ids)


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to continue. request_id is unique among all requests of a server.

    timeout_s: how long its client waits, from now on; None: for ever.
    made: the completion so far, if another router has begun it and told these tokens. None of them
    ended it. This router continues as if it had made them: they count for max_tokens, min_tokens
    and penalties, and the noise is keyed by position. The prompt's log-probabilities were told
    with the first token at the latest. They are not told again.
    replayed: why a frontend sends the request again, one of REPLAY_REASONS; empty the first time.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    timeout_s: float | None = None
    made: tuple[int, ...] = ()
    replayed: str = ""


class FinishReason(str, Enum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities at one position: the chosen token's, then (id, logprob) of the
    most likely ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class TokenDelta:
    """What one step added to one request.

    token_ids and logprobs have the same length (logprobs is empty unless asked for). The last
    delta of a request has either finish_reason or error set; an error is an instance of
    RequestError.
    prompt_logprobs: of the next positions of the prompt, in order; None for its first token, which
    nothing precedes. prompt_first: the position of the first of them.
    cached_tokens: prompt tokens that were not computed but taken from the prefix cache; with the
    completion's first token only.
    first: the index of token_ids[0] in the completion. Tokens of GenerationRequest.made count,
    too. A reader of two routers' deltas can tell by it which tokens are new.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    cached_tokens: int = 0
    first: int = 0
    prompt_first: int = 0

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass(frozen=True)
class RequestLimits:
    """What a router can take.

    max_context_tokens: prompt and completion together. eos_token_ids: the model's.
    """

    vocab_size: int
    max_context_tokens: int
    eos_token_ids: frozenset[int] = frozenset()


def request_limits(config: ModelConfig, max_context_tokens: int | None = None) -> RequestLimits:
    """What a router of this model takes.

    max_context_tokens: prompt and completion together; by default all positions that the model has.
    """
    positions = config.max_position_embeddings
    eos_token_ids = frozenset(config.eos_token_ids)
    return RequestLimits(config.vocab_size, min(positions, max_context_tokens or positions), eos_token_ids)


def check_request(request: GenerationRequest, limits: RequestLimits) -> None:
    """Raise InvalidArgument, naming the field, unless the router can take `request`."""
    sampling, prompt = request.sampling, request.prompt_token_ids
    if not prompt:
        raise InvalidArgument("prompt", "is empty; give at least one token of text or token_ids")
    _check_token_ids("token_ids", prompt, limits.vocab_size)
    if len(prompt) >= limits.max_context_tokens:
        raise InvalidArgument(
            "prompt",
            f"has {len(prompt)} tokens; the context holds {limits.max_context_tokens}, prompt and completion together",
        )
    if sampling.max_tokens < 1:
        raise InvalidArgument("max_tokens", f"is {sampling.max_tokens}; must be at least 1")
    if len(prompt) + sampling.max_tokens > limits.max_context_tokens:
        raise InvalidArgument(
            "max_tokens",
            f"is {sampling.max_tokens}; with a prompt of {len(prompt)} tokens at most "
            f"{limits.max_context_tokens - len(prompt)} fit into the context of {limits.max_context_tokens}",
        )
    if not 0 <= sampling.min_tokens <= sampling.max_tokens:
        raise InvalidArgument(
            "min_tokens", f"is {sampling.min_tokens}; must be from 0 to max_tokens, {sampling.max_tokens}"
        )
    check_made(request, limits)
    if request.timeout_s is not None and not 0.0 < request.timeout_s < math.inf:
        raise InvalidArgument("timeout_s", f"is {request.timeout_s:g}; must be above 0 and finite")
    _check_choice(sampling, limits)
    _check_token_ids("stop_token_ids", tuple(sampling.stop_token_ids), limits.vocab_size)
    _check_count("logprobs", sampling.logprobs)
    _check_count("prompt_logprobs", sampling.prompt_logprobs)
    if sampling.prompt_logprobs is not None:
        entries = len(prompt) * (sampling.prompt_logprobs + 1)
        if entries > MAX_PROMPT_LOGPROB_ENTRIES:
            raise InvalidArgument(
                "prompt_logprobs",
                f"is {sampling.prompt_logprobs}; for a prompt of {len(prompt)} tokens that is {len(prompt)} x "
                f"({sampling.prompt_logprobs} + 1) = {entries} log-probabilities, and at most "
                f"{MAX_PROMPT_LOGPROB_ENTRIES} are returned",
            )


def check_made(request: GenerationRequest, limits: RequestLimits) -> None:
    """Raise InvalidArgument if what was made has ended already, as far as its tokens tell: a stop
    string may have ended it, too."""
    made, sampling = request.made, request.sampling
    _check_token_ids("made", made, limits.vocab_size)
    if len(made) >= sampling.max_tokens:
        raise InvalidArgument(
            "made", f"has {len(made)} tokens; max_tokens is {sampling.max_tokens}, so nothing is left to make"
        )
    ending = sampling.ending_token_ids(limits.eos_token_ids)
    for index, token_id in enumerate(made):
        if token_id in ending:
            raise InvalidArgument("made", f"contains {token_id} at index {index}, which ends the completion")


def _check_choice(sampling: SamplingParams, limits: RequestLimits) -> None:
    """The fields that say how a token is chosen. Every comparison is false for NaN."""
    if not 0.0 <= sampling.temperature <= MAX_TEMPERATURE:
        raise InvalidArgument(
            "temperature", f"is {sampling.temperature:g}; must be from 0 (greedy) to {MAX_TEMPERATURE:g}"
        )
    if not 0.0 < sampling.top_p <= 1.0:
        raise InvalidArgument("top_p", f"is {sampling.top_p:g}; must be above 0 and at most 1")
    if sampling.top_k < 0:
        raise InvalidArgument("top_k", f"is {sampling.top_k}; must be 0 (keep all) or more")
    if not 0.0 <= sampling.min_p <= 1.0:
        raise InvalidArgument("min_p", f"is {sampling.min_p:g}; must be from 0 (keep all) to 1")
    if not 0 <= sampling.seed < 2**64:
        raise InvalidArgument("seed", f"is {sampling.seed}; must be from 0 to 2^64-1")
    for name in ("presence_penalty", "frequency_penalty"):
        penalty: float = getattr(sampling, name)
        if not -MAX_PENALTY <= penalty <= MAX_PENALTY:
            raise InvalidArgument(f"{name}", f"is {penalty:g}; must be from {-MAX_PENALTY:g} to {MAX_PENALTY:g}")
    if not 0.0 < sampling.repetition_penalty < math.inf:
        raise InvalidArgument(
            "repetition_penalty",
            f"is {sampling.repetition_penalty:g}; must be above 0 and finite (1 changes nothing)",
        )
    biased = [token_id for token_id, _ in sampling.logit_bias]
    if len(biased) > MAX_BIASED_TOKENS:
        raise InvalidArgument("logit_bias", f"has {len(biased)} entries; at most {MAX_BIASED_TOKENS} are taken")
    _check_token_ids("logit_bias", tuple(biased), limits.vocab_size)
    assert len(set(biased)) == len(biased)  # a map on the wire
    for token_id, bias in sampling.logit_bias:
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            raise InvalidArgument(
                "logit_bias",
                f"gives token {token_id} a bias of {bias:g}; must be from {-MAX_BIAS:g} to {MAX_BIAS:g}",
            )


def _check_count(field: str, count: int | None) -> None:
    if count is not None and not 0 <= count <= MAX_LOGPROBS:
        raise InvalidArgument(field, f"is {count}; must be from 0 to {MAX_LOGPROBS}")


def _check_token_ids(field: str, token_ids: tuple[int, ...], vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidArgument(field, f"contains {token_id}; token ids go from 0 to {vocab_size - 1}")

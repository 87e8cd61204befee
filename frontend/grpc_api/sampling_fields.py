"""The fields of `SamplingParams` in inference.proto: those for the router, and those that are the frontend's alone."""

import secrets
from dataclasses import dataclass, replace

from protos.drover.v1 import inference_pb2 as pb
from router.errors import InvalidArgument
from router.request import SamplingParams
from router.sampling.noise import derived_seed

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_ANSWERS = 16


@dataclass(frozen=True)
class AnswerParams:
    """How a request is to be answered. router: what the router must know. n: how many answers. stop: stop strings."""

    router: SamplingParams
    n: int
    stop: tuple[str, ...]

    def of_answer(self, index: int) -> SamplingParams:
        """What the router is told for one of the answers; the prompt's log-probabilities come with the first."""
        if index == 0:
            return self.router
        return replace(self.router, seed=derived_seed(self.router.seed, index), prompt_logprobs=None)


def answer_params(given: pb.SamplingParams, default: SamplingParams, room_tokens: int) -> AnswerParams:
    """The sampling fields with defaults for those left out. Raises InvalidArgument for those that are the frontend's.

    room_tokens: how many the context still holds. The seed is drawn here and not in the router, so that another router
    that takes the request over continues with the same tokens.
    """
    n = given.n if given.HasField("n") else 1
    if not 1 <= n <= MAX_ANSWERS:
        raise InvalidArgument("sampling.n", f"is {n}; must be from 1 to {MAX_ANSWERS}")
    router = SamplingParams(
        max_tokens=given.max_tokens if given.HasField("max_tokens") else min(default.max_tokens, room_tokens),
        temperature=given.temperature if given.HasField("temperature") else default.temperature,
        top_p=given.top_p if given.HasField("top_p") else default.top_p,
        top_k=given.top_k if given.HasField("top_k") else default.top_k,
        seed=given.seed if given.HasField("seed") else secrets.randbits(63),
        stop_token_ids=frozenset(given.stop_token_ids) | default.stop_token_ids,
        logprobs=given.logprobs if given.HasField("logprobs") else default.logprobs,
        min_p=given.min_p if given.HasField("min_p") else default.min_p,
        presence_penalty=_or(given, "presence_penalty", default.presence_penalty),
        frequency_penalty=_or(given, "frequency_penalty", default.frequency_penalty),
        repetition_penalty=_or(given, "repetition_penalty", default.repetition_penalty),
        logit_bias=tuple(sorted(given.logit_bias.items())) or default.logit_bias,
        min_tokens=given.min_tokens if given.HasField("min_tokens") else default.min_tokens,
        ignore_eos=given.ignore_eos if given.HasField("ignore_eos") else default.ignore_eos,
        prompt_logprobs=given.prompt_logprobs if given.HasField("prompt_logprobs") else default.prompt_logprobs,
    )
    return AnswerParams(router, n, _stop_strings(given))


def _or(given: pb.SamplingParams, name: str, default: float) -> float:
    value: float = getattr(given, name) if given.HasField(name) else default
    return value


def _stop_strings(given: pb.SamplingParams) -> tuple[str, ...]:
    if len(given.stop) > MAX_STOP_STRINGS:
        raise InvalidArgument("sampling.stop", f"has {len(given.stop)} entries; at most {MAX_STOP_STRINGS} are taken")
    for index, stop in enumerate(given.stop):
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise InvalidArgument(
                f"sampling.stop[{index}]", f"has {len(stop)} characters; must have from 1 to {MAX_STOP_CHARS}"
            )
    return tuple(given.stop)

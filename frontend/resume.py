"""Continuing a call whose stream broke: what its client has, and the requests that make the rest.

Nothing of the broken call is needed but what the client sends: tokens follow from the model, the
prompt, the parameters, the seed, and the tokens before. So it does not matter what has died.
"""

import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from frontend.answer_params import AnswerParams
from router.errors import InvalidArgument
from router.request import RESUMED, GenerationRequest, RequestLimits, SamplingParams, check_made

_CALL_ID = re.compile("[0-9a-f]{32}")
MAX_SKEW_S = 86_400.0  # between the clocks of hosts


def new_call_id() -> str:
    """32 hexadecimal digits that nobody can guess. They begin with the time, in milliseconds.

    So a chat template that writes the date writes the same one when the call is resumed.
    """
    return f"{time.time_ns() // 10**6:012x}{secrets.token_hex(10)}"


def began_s(call_id: str) -> float:
    """When the call began, in seconds since the epoch."""
    return int(call_id[:12], 16) / 1e3


@dataclass(frozen=True)
class Resume:
    """Fields mean what inference.proto says of those of the same name.

    received: the tokens of each answer, by index; answers may be missing at the end.
    attempt: tells this attempt's requests at a router from those of the broken call, and from
    older and newer attempts: later ones come later in the order of text. Hosts' clocks may differ
    by less than a client pauses between two attempts.
    """

    request_id: str
    received: Sequence[tuple[int, ...]] = ()
    prompt_logprobs: int = 0
    attempt: str = field(default_factory=lambda: f"{time.time_ns() // 10**6:012x}{secrets.token_hex(2)}")

    @property
    def attempt_id(self) -> str:
        """With this the ids of the attempt's requests begin."""
        return f"{self.request_id}+{self.attempt}"

    def call_id(self) -> str:
        """The id of the call. Raises InvalidArgument if no server made it."""
        known = _CALL_ID.fullmatch(self.request_id) is not None
        if not known or began_s(self.request_id) > time.time() + MAX_SKEW_S:
            raise InvalidArgument(
                "resume.request_id", f"is {self.request_id[:80]!r}; give GenerateResponse.request_id of the stream"
            )
        return self.request_id

    def check(self, params: AnswerParams, n: int, sampling: SamplingParams) -> None:
        """Raise InvalidArgument unless this can be part of a call with these parameters.

        sampling: what they come to.
        """
        if len(self.received) > n:
            raise InvalidArgument("resume.received", f"has {len(self.received)} entries; n is {n}")
        if sampling.temperature > 0 and params.seed is None:
            raise InvalidArgument(
                "seed",
                "is not set; to resume an answer whose temperature is above 0, give the seed that its stream told in "
                "its first message",
            )

    def requests(self, requests: Sequence[GenerationRequest], limits: RequestLimits) -> list[GenerationRequest]:
        """The call's requests, with what was made of each. Their ids are new: the old may be in use.

        Raises InvalidArgument if a completion cannot be going on so.
        """
        continued = []
        for index, request in enumerate(requests):
            made, field_name = self.received[index] if index < len(self.received) else (), _field(index)
            max_tokens = request.sampling.max_tokens
            if len(made) > max_tokens:
                raise InvalidArgument(field_name, f"has {len(made)} tokens; max_tokens is {max_tokens}")
            continued.append(replace(request, request_id=f"{self.attempt_id}-{index}", made=made, replayed=RESUMED))
            try:
                if not is_complete(continued[-1], limits):
                    check_made(continued[-1], limits)
            except InvalidArgument as error:
                raise InvalidArgument(field_name, error.reason) from None
        return continued


def _field(index: int) -> str:
    return f"resume.received[{index}].token_ids"


def is_complete(request: GenerationRequest, limits: RequestLimits) -> bool:
    """Whether what was made is a whole completion. A stop string may have ended it, too."""
    made, sampling = request.made, request.sampling
    ending = sampling.ending_token_ids(limits.eos_token_ids)
    return len(made) >= sampling.max_tokens or (bool(made) and made[-1] in ending)

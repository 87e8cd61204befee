"""A request that may change its router amid its answer."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from router.request import FinishReason, GenerationRequest, TokenDelta


@dataclass
class RunningRequest:
    """A request, and what was told of its answer.

    made: the completion so far. prompt_told: prompt positions whose log-probabilities were told.
    deadline_s: when its client gives up; None: never.
    router: who has it, or had it before going down; None: nobody.
    replayed: why it has to be sent again, one of REPLAY_REASONS; empty while it has not.
    give_up_s: until when it waits for a router; None while none is missing.
    refused_by: routers that had no room for it, or could not go on with it, since the last word of its answer.
    losses: how many routers ended in a row that had it, without a word of its answer in between.
    """

    request: GenerationRequest
    deadline_s: float | None
    made: list[int]
    prompt_told: int = 0
    router: str | None = None
    replayed: str = ""
    give_up_s: float | None = None
    refused_by: set[str] = field(default_factory=set)
    losses: int = 0

    @staticmethod
    def of(request: GenerationRequest, now_s: float) -> "RunningRequest":
        deadline_s = None if request.timeout_s is None else now_s + request.timeout_s
        return RunningRequest(request, deadline_s, list(request.made))

    def is_late(self, now_s: float) -> bool:
        """Whether its client's deadline has passed."""
        return self.deadline_s is not None and now_s >= self.deadline_s

    def rest(self, now_s: float) -> GenerationRequest:
        """What a router has left to do, if it is not late."""
        left_s = None if self.deadline_s is None else self.deadline_s - now_s
        return replace(
            self.request, made=tuple(self.made), timeout_s=left_s, replayed=self.replayed or self.request.replayed
        )

    def finish(self, eos_token_ids: Iterable[int]) -> FinishReason | None:
        """Why nothing is left to do, if what was made ended the completion.

        A router tells both at once, so this is for an end that was lost on its way.
        """
        if self.made and self.made[-1] in self.request.sampling.ending_token_ids(eos_token_ids):
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.made) >= self.request.sampling.max_tokens else None

    def news(self, delta: TokenDelta) -> TokenDelta | None:
        """What of the delta was not told yet, if anything; from now on it is told.

        A router that takes a request over may tell the beginning again: the prompt's
        log-probabilities, and what the router before had told to nobody.
        """
        assert delta.first <= len(self.made), f"token {delta.first} follows {len(self.made)} tokens"
        old = len(self.made) - delta.first
        old_prompt = max(0, self.prompt_told - delta.prompt_first)
        if old or old_prompt:
            delta = replace(
                delta,
                token_ids=delta.token_ids[old:],
                logprobs=delta.logprobs[old:],
                prompt_logprobs=delta.prompt_logprobs[old_prompt:],
                cached_tokens=0 if old else delta.cached_tokens,
                first=len(self.made),
                prompt_first=self.prompt_told,
            )
        if not (delta.token_ids or delta.prompt_logprobs or delta.is_last):
            return None
        self.made += delta.token_ids
        self.prompt_told += len(delta.prompt_logprobs)
        self.losses, self.give_up_s = 0, None
        self.refused_by.clear()
        return delta

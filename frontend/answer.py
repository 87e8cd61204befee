"""One answer on its way out: from the router's deltas to the messages of the stream."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from checkpoint.tokenizer import Tokenizer
from frontend.detokenizer import IncrementalDetokenizer
from frontend.stop_strings import StopMatcher, StopStrings
from protos.drover.v1 import inference_pb2 as pb
from router.request import FinishReason, GenerationRequest, TokenDelta, TokenLogprobs

_FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


@dataclass(frozen=True)
class _Waiting:
    """A token whose text is not out yet. end: how many characters of the answer must be, before it may be."""

    token_id: int
    logprob: TokenLogprobs | None
    end: int


class Answer:
    """Takes the deltas of one request, oldest first, until it has finished."""

    def __init__(
        self, request: GenerationRequest, tokenizer: Tokenizer, stops: StopStrings, *, request_id: str, index: int
    ) -> None:
        """request_id, index: as the client knows the answer."""
        self._request = request
        self._request_id, self._index = request_id, index
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._matcher = StopMatcher(stops)
        self._has_stops = bool(stops.root.next)
        self._waiting: deque[_Waiting] = deque()
        self._chars = 0  # of the answer's text, whether out or held back
        self._completion_tokens = self._cached_tokens = 0
        self._prompt_place = 0
        self.finished = False

    def take(self, delta: TokenDelta) -> pb.GenerateResponse | None:
        """The message that a delta makes, if it makes one; the last one says why the text ended.

        A token that ended the text is no part of it. If a stop string ends it, what the delta brings besides is
        dropped; the caller must see to it that the router makes no more.
        """
        response = pb.GenerateResponse(request_id=self._request_id, index=self._index)
        self._cached_tokens += delta.cached_tokens
        response.prompt_logprobs.extend(self._prompt_logprobs(delta.prompt_logprobs))
        logprobs: Sequence[TokenLogprobs | None] = delta.logprobs or [None] * len(delta.token_ids)
        ending_place = len(delta.token_ids) - 1 if delta.finish_reason is FinishReason.STOP else None
        stop = None
        for place, (token_id, logprob) in enumerate(zip(delta.token_ids, logprobs, strict=True)):
            self._completion_tokens += 1
            text = "" if place == ending_place else self._detokenizer.push([token_id])
            stop = self._add(response, text)
            # A token that begins a character may begin a stop string with it.
            unfinished = self._has_stops and self._detokenizer.amid_character
            self._waiting.append(_Waiting(token_id, logprob, self._chars + unfinished))
            if stop is not None:
                break
        if stop is None and delta.finish_reason is not None:
            stop = self._add(response, self._detokenizer.finish())
            response.text += self._matcher.finish()
        if stop is not None or delta.finish_reason is not None:
            self._finish(response, delta, stop)
        self._release_tokens(response)
        has_news = self.finished or response.token_ids or response.text or response.prompt_logprobs
        return response if has_news else None

    def _add(self, response: pb.GenerateResponse, text: str) -> str | None:
        """Add what is certain of a new piece of text; returns the stop string that it completes."""
        if not text:
            return None
        self._chars += len(text)
        late_enough = self._completion_tokens > self._request.sampling.min_tokens
        certain, stop = self._matcher.push(text, may_stop=late_enough)
        response.text += certain
        return stop

    def _finish(self, response: pb.GenerateResponse, delta: TokenDelta, stop: str | None) -> None:
        self.finished = True
        if stop is not None:
            response.finish_reason = pb.FINISH_REASON_STOP
            response.stop_string = stop
        elif delta.finish_reason is not None:
            response.finish_reason = _FINISH_REASONS[delta.finish_reason]
            if delta.finish_reason is FinishReason.STOP and delta.token_ids:
                response.stop_token_id = delta.token_ids[-1]
        response.usage.prompt_tokens = len(self._request.prompt_token_ids)
        response.usage.completion_tokens = self._completion_tokens
        response.usage.cached_tokens = self._cached_tokens

    def _release_tokens(self, response: pb.GenerateResponse) -> None:
        out_chars = self._chars - self._matcher.held_chars
        while self._waiting and (self.finished or self._waiting[0].end <= out_chars):
            token = self._waiting.popleft()
            response.token_ids.append(token.token_id)
            if token.logprob is not None:
                response.logprobs.append(_logprob(token.logprob))

    def _prompt_logprobs(self, entries: Sequence[TokenLogprobs | None]) -> list[pb.PromptLogprob]:
        first = self._prompt_place
        self._prompt_place += len(entries)
        return [
            pb.PromptLogprob(token_id=self._request.prompt_token_ids[place])
            if entry is None
            else pb.PromptLogprob(token_id=entry.token_id, logprob=entry.logprob, top=_alternatives(entry))
            for place, entry in enumerate(entries, first)
        ]


def _logprob(entry: TokenLogprobs) -> pb.TokenLogprob:
    return pb.TokenLogprob(token_id=entry.token_id, logprob=entry.logprob, top=_alternatives(entry))


def _alternatives(entry: TokenLogprobs) -> list[pb.TokenAlternative]:
    return [pb.TokenAlternative(token_id=token_id, logprob=logprob) for token_id, logprob in entry.top]

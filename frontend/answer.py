"""One answer on its way out: from the router's token deltas to what a client sees, whatever
protocol it speaks."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from checkpoint.tokenizer import Tokenizer
from frontend.detokenizer import IncrementalDetokenizer
from frontend.stop_strings import StopMatcher, StopStrings
from router.request import FinishReason, GenerationRequest, TokenDelta, TokenLogprobs


@dataclass(frozen=True)
class PromptLogprob:
    """How likely a token of the prompt was.

    logprob: None for the first token, which nothing precedes.

    top: (token id, logprob) of the most likely tokens at its position.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens that an answer took. cached_tokens: of the prompt's, those found in the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """What is new of one answer.

    request_id: of the whole call, the same for all of its answers. index: which answer, from 0 to
    n - 1.
    text: whole characters. token_ids: come together with their text, so that the tokens of all
    deltas so far say how much text was sent. logprobs: one per token, if asked for.
    seed: of the call, in its first delta only.
    finish_reason, usage: in an answer's last delta only. stop_string or stop_token_id: what ended
    the text; a stop token is the last of token_ids, and neither is part of text. prompt_logprobs:
    the prompt's next tokens, in order.
    """

    request_id: str
    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[PromptLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_string: str | None = None
    stop_token_id: int | None = None
    usage: Usage | None = None
    seed: int | None = None


SKIPPED_AT_ONCE = 256  # tokens; a completion may have millions


class _HeldToken(NamedTuple):
    """A token that waits for its text.

    end: length in characters that the answer's text must reach to release it.
    """

    token_id: int
    logprob: TokenLogprobs | None
    end: int


class Answer:
    """Takes the token deltas of one request, oldest first, until it has finished."""

    def __init__(
        self, request: GenerationRequest, tokenizer: Tokenizer, stops: StopStrings, *, request_id: str, index: int
    ) -> None:
        """request_id, index: as the client knows the answer."""
        self._request = request
        self._request_id, self._index = request_id, index
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._matcher = StopMatcher(stops)
        self._has_stops = bool(stops.root.next)
        self._held: deque[_HeldToken] = deque()
        self._chars = 0  # length of the answer's text, with what the matcher holds back
        self._decided_chars = 0  # without it
        self._sent_chars = self._released_chars = 0  # of the text, and of the tokens' text
        self._unsent = ""  # decided, but its token is not
        self._completion_tokens = self._cached_tokens = 0
        self._prompt_position = self._prompt_logprobs_sent = 0
        self.finished = False

    def skip(self, received: Sequence[int], prompt_logprobs: int) -> None:
        """Begin behind what the client has: tokens with their text, and so many prompt_logprobs.

        Finishes the answer if a stop string is complete in it. Before the first `take`.
        """
        self._prompt_logprobs_sent = prompt_logprobs
        for first in range(0, len(received), SKIPPED_AT_ONCE):
            piece = tuple(received[first : first + SKIPPED_AT_ONCE])
            if self._append(TokenDelta(self._request_id, piece)) is not None:
                self.finished = True
                return
            # What is decided ends before the last token does. So it was all sent.
            self._sent_chars, self._unsent = self._held[-1].end, ""
            self._held.clear()

    def take(self, delta: TokenDelta) -> AnswerDelta | None:
        """What the delta adds to the answer, if anything can be shown already.

        The token that ended the text is not part of it. If a stop string ends the text, the rest
        of the delta is dropped, and the caller must cancel the request.
        """
        assert delta.first == self._completion_tokens, f"token {delta.first} follows {self._completion_tokens} tokens"
        self._cached_tokens += delta.cached_tokens
        stop = self._append(delta)
        if stop is not None or delta.finish_reason is not None:
            self.finished = True
        token_ids, logprobs = self._release_tokens()
        text = self._release_text()
        prompt_logprobs = self._prompt_logprobs(delta.prompt_logprobs) if delta.prompt_logprobs else ()
        if not self.finished:
            if not (text or token_ids or prompt_logprobs):
                return None
            return AnswerDelta(self._request_id, self._index, text, token_ids, logprobs, prompt_logprobs)
        stopped_by_token = stop is None and delta.finish_reason is FinishReason.STOP and delta.token_ids
        return AnswerDelta(
            self._request_id,
            self._index,
            text,
            token_ids,
            logprobs,
            prompt_logprobs,
            finish_reason=delta.finish_reason if stop is None else FinishReason.STOP,
            stop_string=stop,
            stop_token_id=delta.token_ids[-1] if stopped_by_token else None,
            usage=Usage(len(self._request.prompt_token_ids), self._completion_tokens, self._cached_tokens),
        )

    def _append(self, delta: TokenDelta) -> str | None:
        """The stop string that ends the text, if any. Holds the delta's tokens, and their text."""
        logprobs: Sequence[TokenLogprobs | None] = delta.logprobs or [None] * len(delta.token_ids)
        last = len(delta.token_ids) - 1 if delta.finish_reason is FinishReason.STOP else None
        for position, (token_id, logprob) in enumerate(zip(delta.token_ids, logprobs, strict=True)):
            self._completion_tokens += 1
            text = "" if position == last else self._detokenizer.decode([token_id])
            stop = self._match(text)
            # A token that begins a character may begin a stop string with it.
            unfinished = self._has_stops and self._detokenizer.amid_character
            self._held.append(_HeldToken(token_id, logprob, self._chars + unfinished))
            if stop is not None:
                return stop
        if delta.finish_reason is None:
            return None
        stop = self._match(self._detokenizer.flush())
        self._decide(self._matcher.flush())
        return stop

    def _match(self, text: str) -> str | None:
        """Look for stop strings in the next piece of text: the one that ends it, if any."""
        if not text:
            return None
        self._chars += len(text)
        late_enough = self._completion_tokens > self._request.sampling.min_tokens
        decided, stop = self._matcher.match(text, may_stop=late_enough)
        self._decide(decided)
        return stop

    def _decide(self, text: str) -> None:
        """No stop string can take this text back any more. The client may have its beginning."""
        known = max(0, self._sent_chars - self._decided_chars)
        self._decided_chars += len(text)
        self._unsent += text[known:]

    def _release_tokens(self) -> tuple[tuple[int, ...], tuple[TokenLogprobs, ...]]:
        """The held tokens whose text is shown, and their logprobs; all of them once the answer has
        finished."""
        token_ids, logprobs = [], []
        while self._held and (self.finished or self._held[0].end <= self._decided_chars):
            token = self._held.popleft()
            token_ids.append(token.token_id)
            self._released_chars = token.end
            if token.logprob is not None:
                logprobs.append(token.logprob)
        return tuple(token_ids), tuple(logprobs)

    def _release_text(self) -> str:
        """The text of the tokens released so far that was not sent yet; all of it once the answer
        has finished."""
        count = len(self._unsent) if self.finished else max(0, self._released_chars - self._sent_chars)
        text, self._unsent = self._unsent[:count], self._unsent[count:]
        self._sent_chars += count
        return text

    def _prompt_logprobs(self, entries: Sequence[TokenLogprobs | None]) -> tuple[PromptLogprob, ...]:
        first = self._prompt_position
        self._prompt_position += len(entries)
        known = max(0, self._prompt_logprobs_sent - first)
        entries, first = entries[known:], first + known
        return tuple(
            PromptLogprob(self._request.prompt_token_ids[position])
            if entry is None
            else PromptLogprob(entry.token_id, entry.logprob, entry.top)
            for position, entry in enumerate(entries, first)
        )

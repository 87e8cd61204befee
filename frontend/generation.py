"""From a prompt and parameters to answers, for every protocol: plain data in, plain data out.

A protocol's edge (grpc_api/) translates its messages and names its fields; all else that protocols
share is here. Errors are those of router/errors.py. They name bare fields: "max_tokens",
"stop[2]", "messages[0].content"; an edge adds the path that its clients know.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from checkpoint.tokenizer import Tokenizer
from frontend.answer import Answer, AnswerDelta
from frontend.answer_params import AnswerParams
from frontend.chat_template import ChatTemplate, Message
from frontend.model_card import ModelCard
from frontend.resume import Resume, began_s, is_complete, new_call_id
from frontend.router_client import RouterClient
from frontend.stop_strings import StopStrings
from router.counts.requests import CANCELLED
from router.errors import InvalidArgument, NotFound
from router.request import FinishReason, GenerationRequest, RequestLimits, SamplingParams, check_request
from router.sampling.noise import derived_seed

# A longer text is tokenized in a thread, so that it does not hold up everybody's streams. 16 KiB
# take about 5 ms.
LARGE_TEXT_BYTES = 16_384

Result = TypeVar("Result")


@dataclass(frozen=True)
class TextPrompt:
    """Text to continue.

    The beginning-of-text token is put in front; names of special tokens stay text.
    """

    text: str


@dataclass(frozen=True)
class TokenPrompt:
    """Token ids to continue, taken as they are."""

    token_ids: Sequence[int]


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation to answer, oldest message first.

    Needs a chat template: see `Generation.has_chat_template`.
    """

    messages: Sequence[Message]


Prompt = TextPrompt | TokenPrompt | ChatPrompt


class Generation:
    """Answers prompts with the one model that is served. Lives on one event loop."""

    def __init__(
        self, card: ModelCard, tokenizer: Tokenizer, chat_template: ChatTemplate | None, router: RouterClient
    ) -> None:
        self.card = card
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._router = router
        self._chat_threads = ThreadPoolExecutor(4, "chat")

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    @property
    def bos_token_id(self) -> int | None:
        """The token that is put in front of a text; None where the model has none."""
        return self._tokenizer.bos_token_id

    async def limits(self) -> RequestLimits:
        """What the router can take."""
        return await self._router.limits()

    def check_model(self, name: str) -> None:
        """Raise NotFound unless `name` is the served model's, or empty."""
        if name not in ("", self.card.name):
            raise NotFound(f"model: {_quoted(name)} is not served here; this server serves {self.card.name!r}")

    async def tokenize(self, text: str, *, add_bos: bool) -> list[int]:
        """The token ids of a text, with the beginning-of-text token in front if `add_bos`."""
        return await _in_thread_if_large(_utf8_bytes(text), lambda: self._tokenizer.encode(text, add_bos=add_bos))

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids; special tokens appear under their names. Raises InvalidArgument."""
        limits = await self._router.limits()
        vocab_size = limits.vocab_size
        if len(token_ids) > limits.max_context_tokens:
            raise InvalidArgument(
                "token_ids", f"has {len(token_ids)} tokens; at most {limits.max_context_tokens} fit into the context"
            )
        if token_ids and max(token_ids) >= vocab_size:
            raise InvalidArgument("token_ids", f"contains {max(token_ids)}; token ids go from 0 to {vocab_size - 1}")
        return await _in_thread_if_large(len(token_ids), lambda: self._tokenizer.decode(token_ids, skip_special=False))

    async def answer(
        self, prompt: Prompt, params: AnswerParams, resume: Resume | None = None
    ) -> AsyncGenerator[AnswerDelta, None]:
        """The deltas of all answers as they are made, mixed; each answer's last one has a finish_reason.

        resume: give only what is missing of a call that broke. Closing or cancelling this at any
        point frees the router's work within one step. The first answer that fails ends all. Raises
        RequestError.
        """
        params = replace(params, stop=params.stop or self.card.default_stop)
        n = params.num_answers()  # what needs no prompt is checked before the prompt takes time
        params.check_lists()
        limits = await self._router.limits()
        call_id = new_call_id() if resume is None else resume.call_id()
        token_ids = tuple(await self._token_ids(prompt, limits, began_s(call_id)))
        params = self._with_stop_tokens(params, prompt)
        requests = self._requests(call_id, token_ids, n, params, limits)
        told_seed: int | None = requests[0].sampling.seed
        if resume is not None:
            resume.check(params, n, requests[0].sampling)
            requests = resume.requests(requests, limits)
        stops = StopStrings(params.stop)
        answers = {
            request.request_id: Answer(request, self._tokenizer, stops, request_id=call_id, index=index)
            for index, request in enumerate(requests)
        }
        if resume is not None:
            requests = await _skip(answers, requests, resume, limits)
            self._router.release(call_id, keep=resume.attempt_id)
        token_deltas = self._router.generate(requests)
        try:
            async for token_delta in token_deltas:
                answer = answers[token_delta.request_id]
                delta = answer.take(token_delta)
                if answer.finished and not token_delta.is_last:
                    token_deltas.cancel(token_delta.request_id, FinishReason.STOP.value)  # by a stop string
                if delta is not None:
                    yield delta if told_seed is None else replace(delta, seed=told_seed)
                    told_seed = None
        finally:
            token_deltas.close(CANCELLED)

    def _with_stop_tokens(self, params: AnswerParams, prompt: Prompt) -> AnswerParams:
        """The parameters with the tokens that end this answer besides the model's end tokens.

        A stop string may be a special token's name, which never is in the text. A chat's turn ends
        with the tokenizer's own end token, too: the config of a chat model may not list it.
        """
        named = {self._tokenizer.special_tokens.get(stop) for stop in params.stop}
        if isinstance(prompt, ChatPrompt) and not params.ignore_eos:
            named.add(self._tokenizer.eos_token_id)
        stop_token_ids = {token_id for token_id in named if token_id is not None}
        if not stop_token_ids:
            return params
        return replace(params, stop_token_ids=stop_token_ids.union(params.stop_token_ids or ()))

    def _requests(
        self, call_id: str, token_ids: tuple[int, ...], n: int, params: AnswerParams, limits: RequestLimits
    ) -> list[GenerationRequest]:
        """One request for each of the n answers, the first one's id being the call's.

        Raises InvalidArgument.
        """
        sampling = params.sampling(self.card.default_sampling, limits.max_context_tokens - len(token_ids))
        first = GenerationRequest(call_id, token_ids, sampling, params.timeout_s)
        check_request(first, limits)
        others = [
            replace(first, request_id=f"{call_id}-{index}", sampling=_sampling_of_answer(sampling, index))
            for index in range(1, n)
        ]
        return [first, *others]

    async def _token_ids(self, prompt: Prompt, limits: RequestLimits, now_s: float) -> Sequence[int]:
        """The prompt as the model reads it. now_s: when the call began, for chat templates.

        Refuses what cannot fit before it takes the time to tokenize it.
        """
        match prompt:
            case TokenPrompt(token_ids):
                _check_fits("token_ids", len(token_ids), limits)
                return token_ids
            case TextPrompt(text):
                if not text:
                    raise InvalidArgument("text", "is empty; give at least one character, or token_ids")
                self._check_text_fits("text", text, limits)
                return await self.tokenize(text, add_bos=True)
            case ChatPrompt(messages):
                return await self._chat_token_ids(messages, limits, now_s)

    async def _chat_token_ids(self, messages: Sequence[Message], limits: RequestLimits, now_s: float) -> Sequence[int]:
        template = self._chat_template
        assert template is not None, "whoever sends messages must look at has_chat_template first"
        content_bytes = sum(
            self._check_text_fits(f"messages[{index}].content", content, limits)
            for index, (_, content) in enumerate(messages)
        )
        # A template writes at least one token for each message, even if its content is empty.
        _check_fits("messages", max(len(messages), content_bytes // self._tokenizer.max_token_bytes), limits)
        # Always in a thread: the checkpoint's template may take as long as it is allowed to.
        encode = partial(template.encode, messages, self._tokenizer, limits.max_context_tokens, now_s=now_s)
        return await asyncio.get_running_loop().run_in_executor(self._chat_threads, encode)

    def _check_text_fits(self, field: str, text: str, limits: RequestLimits) -> int:
        """The text's size in bytes.

        Raises InvalidArgument if a text of this size cannot fit into the context.
        """
        text_bytes = _utf8_bytes(text)
        _check_fits(field, text_bytes // self._tokenizer.max_token_bytes, limits)
        return text_bytes


def _sampling_of_answer(first: SamplingParams, index: int) -> SamplingParams:
    """Sampling of a further answer: with a seed of its own, and without the prompt's logprobs,
    which come once."""
    return replace(first, seed=derived_seed(first.seed, index), prompt_logprobs=None)


async def _skip(
    answers: Mapping[str, Answer], requests: Sequence[GenerationRequest], resume: Resume, limits: RequestLimits
) -> list[GenerationRequest]:
    """Begin each answer behind what its client has. The requests of answers that are not complete."""
    begun = [request for request in requests if not is_complete(request, limits)]

    def skip() -> None:
        for request in begun:
            answers[request.request_id].skip(request.made, resume.prompt_logprobs)

    # Text of so many bytes takes about as long.
    await _in_thread_if_large(8 * sum(len(request.made) for request in begun), skip)
    return [request for request in begun if not answers[request.request_id].finished]


def _check_fits(field: str, min_tokens: int, limits: RequestLimits) -> None:
    if min_tokens >= limits.max_context_tokens:
        raise InvalidArgument(
            field,
            f"has at least {min_tokens} tokens; the context holds {limits.max_context_tokens}, prompt and completion "
            "together",
        )


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _quoted(name: str, limit_chars: int = 80) -> str:
    return repr(name) if len(name) <= limit_chars else repr(name[:limit_chars]) + "..."


async def _in_thread_if_large(text_bytes: int, work: Callable[[], Result]) -> Result:
    """The result of `work`, which takes time in proportion to `text_bytes`."""
    return await asyncio.to_thread(work) if text_bytes > LARGE_TEXT_BYTES else work()

"""drover.v1.Inference: from protobuf to token ids and back. Knows gRPC's messages, but neither its servers nor Ray.

Every method takes one request and returns, or streams, its responses; it fails with an error of router/errors.py,
which `frontend/grpc_api/server.py` turns into a status.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from checkpoint.config import ModelConfig
from checkpoint.layout import count_parameters
from checkpoint.tokenizer import Tokenizer
from frontend.answer import Answer
from frontend.chat_template import ChatTemplate
from frontend.grpc_api.sampling_fields import answer_params
from frontend.merge import merged
from frontend.router_client import RouterClient
from frontend.stop_strings import StopStrings
from protos.drover.v1 import inference_pb2 as pb
from router.counts.requests import CANCELLED
from router.errors import InvalidArgument, NotFound
from router.request import (
    DEFAULT_MAX_TOKENS,
    FinishReason,
    GenerationRequest,
    RequestLimits,
    SamplingParams,
    check_request,
)

# A longer text is tokenized in a thread, so that it does not hold up everybody's streams. 16 KiB take about 5 ms.
LARGE_TEXT_BYTES = 16_384
# What inference.proto promises for the sampling fields that are left out.
DEFAULT_SAMPLING = SamplingParams(max_tokens=DEFAULT_MAX_TOKENS)

Result = TypeVar("Result")


@dataclass(frozen=True)
class ModelCard:
    """What GetModelInfo tells about the model, besides what the tokenizer and the router's limits say themselves.

    Fields are those of GetModelInfoResponse; `name` is its `model`. default_sampling fills in the sampling fields that
    a request leaves out, but for the seed, which is then random.
    """

    name: str
    eos_token_ids: tuple[int, ...]
    num_layers: int
    num_moe_layers: int
    num_experts: int
    experts_per_token: int
    total_parameters: int
    active_parameters: int
    dtype: str
    default_sampling: SamplingParams = DEFAULT_SAMPLING

    @classmethod
    def of(cls, name: str, config: ModelConfig, dtype: str) -> "ModelCard":
        """The card of a checkpoint that is served under `name` in `dtype`."""
        total, active = count_parameters(config)
        return cls(
            name=name,
            eos_token_ids=config.eos_token_ids,
            num_layers=config.num_layers,
            num_moe_layers=len(config.moe_layers),
            num_experts=config.num_experts,
            experts_per_token=config.experts_per_token,
            total_parameters=total,
            active_parameters=active,
            dtype=dtype,
            default_sampling=SamplingParams(
                max_tokens=DEFAULT_MAX_TOKENS,
                temperature=config.sampling_defaults.temperature,
                top_p=config.sampling_defaults.top_p,
                top_k=config.sampling_defaults.top_k,
            ),
        )


class InferenceService:
    """The service's methods, under the names that inference.proto gives them."""

    def __init__(
        self,
        model_card: ModelCard,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        router_client: RouterClient,
    ) -> None:
        self._card = model_card
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._router = router_client

    async def Generate(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Continue a prompt."""
        self._check_model(request.model)
        limits = await self._router.limits()
        prompt = await self._prompt_token_ids(request, limits)
        async with aclosing(self._answer(prompt, request, limits)) as responses:
            async for response in responses:
                yield response

    async def Chat(self, request: pb.ChatRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Answer a conversation."""
        self._check_model(request.model)
        limits = await self._router.limits()
        prompt = await self._chat_token_ids(request, limits)
        async with aclosing(self._answer(prompt, request, limits)) as responses:
            async for response in responses:
                yield response

    async def Tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        """Text to token ids."""
        self._check_model(request.model)
        add_bos = request.add_bos if request.HasField("add_bos") else True
        token_ids = await _unhurried(
            _utf8_bytes(request.text), lambda: self._tokenizer.encode(request.text, add_bos=add_bos)
        )
        return pb.TokenizeResponse(token_ids=token_ids)

    async def Detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        """Token ids to text."""
        self._check_model(request.model)
        limits = await self._router.limits()
        token_ids = list(request.token_ids)
        if token_ids and max(token_ids) >= limits.vocab_size:
            raise InvalidArgument(
                "token_ids", f"contains {max(token_ids)}; token ids go from 0 to {limits.vocab_size - 1}"
            )
        text = await _unhurried(len(token_ids), lambda: self._tokenizer.decode(token_ids, skip_special=False))
        return pb.DetokenizeResponse(text=text)

    async def GetModelInfo(self, request: pb.GetModelInfoRequest) -> pb.GetModelInfoResponse:
        """What is served, and its limits."""
        self._check_model(request.model)
        card, limits = self._card, await self._router.limits()
        return pb.GetModelInfoResponse(
            model=card.name,
            vocab_size=limits.vocab_size,
            max_context_tokens=limits.max_context_tokens,
            eos_token_ids=card.eos_token_ids,
            bos_token_id=self._tokenizer.bos_token_id,
            num_layers=card.num_layers,
            num_moe_layers=card.num_moe_layers,
            num_experts=card.num_experts,
            experts_per_token=card.experts_per_token,
            total_parameters=card.total_parameters,
            active_parameters=card.active_parameters,
            dtype=card.dtype,
            has_chat_template=self._chat_template is not None,
        )

    async def _answer(
        self, prompt_token_ids: Sequence[int], request: pb.GenerateRequest | pb.ChatRequest, limits: RequestLimits
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Queue what was asked for, once checked, and stream what becomes of it; closing this frees all its work."""
        prompt, request_id = tuple(prompt_token_ids), uuid.uuid4().hex
        timeout_s = request.timeout_s if request.HasField("timeout_s") else None
        params = answer_params(request.sampling, self._card.default_sampling, limits.max_context_tokens - len(prompt))
        requests = [
            GenerationRequest(
                f"{request_id}-{index}" if index else request_id, prompt, params.of_answer(index), timeout_s
            )
            for index in range(params.n)
        ]
        check_request(requests[0], limits)
        stops = StopStrings(params.stop)
        answers = [
            Answer(request, self._tokenizer, stops, request_id=request_id, index=index)
            for index, request in enumerate(requests)
        ]
        streams = [self._stream(request, answer) for request, answer in zip(requests, answers, strict=True)]
        async with aclosing(merged(streams)) as responses:
            async for response in responses:
                yield response

    async def _stream(self, request: GenerationRequest, answer: Answer) -> AsyncGenerator[pb.GenerateResponse, None]:
        """One answer's messages; when it has finished, or this is closed, the router's work for it ends."""

        def ending() -> str:
            """What the router counts if it does not end the answer itself: a stop string, or a client that left."""
            return FinishReason.STOP.value if answer.finished else CANCELLED

        async with aclosing(self._router.generate(request, ending)) as deltas:
            async for delta in deltas:
                if delta.error is not None:
                    raise delta.error
                response = answer.take(delta)
                if response is not None:
                    yield response
                if answer.finished:
                    return
        raise AssertionError(f"request {request.request_id}: the router's stream ended without a finish reason")

    async def _prompt_token_ids(self, request: pb.GenerateRequest, limits: RequestLimits) -> Sequence[int]:
        kind = request.WhichOneof("prompt")
        if kind is None:
            raise InvalidArgument("prompt", "is not set; give text or token_ids")
        if kind == "token_ids":
            token_ids = request.token_ids.ids
            _check_fits("prompt.token_ids", len(token_ids), limits)
            return tuple(token_ids)
        if not request.text:
            raise InvalidArgument("prompt.text", "is empty; give at least one character, or token_ids")
        text_bytes = self._check_text_fits("prompt.text", request.text, limits)
        return await _unhurried(text_bytes, lambda: self._tokenizer.encode(request.text, add_bos=True))

    async def _chat_token_ids(self, request: pb.ChatRequest, limits: RequestLimits) -> Sequence[int]:
        template = self._chat_template
        if template is None:
            raise InvalidArgument(
                "messages", f"cannot be formatted: model {self._card.name!r} has no chat template; call Generate"
            )
        text_bytes = sum(
            self._check_text_fits(f"messages[{index}].content", message.content, limits)
            for index, message in enumerate(request.messages)
        )
        # A template writes at least one token for each message, though its content may be empty.
        _check_fits("messages", max(len(request.messages), text_bytes // self._tokenizer.max_token_bytes), limits)
        messages = [(message.role, message.content) for message in request.messages]
        return await _unhurried(request.ByteSize(), lambda: template.encode(messages, self._tokenizer))

    def _check_model(self, name: str) -> None:
        if name not in ("", self._card.name):
            raise NotFound(f"model: {_quoted(name)} is not served here; this server serves {self._card.name!r}")

    def _check_text_fits(self, field: str, text: str, limits: RequestLimits) -> int:
        """Raise unless the text might fit into the context: seen from its size alone, so cheap. Returns the size."""
        text_bytes = _utf8_bytes(text)
        _check_fits(field, text_bytes // self._tokenizer.max_token_bytes, limits)
        return text_bytes


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


async def _unhurried(text_bytes: int, work: Callable[[], Result]) -> Result:
    """The result of `work`, which takes time in proportion to `text_bytes`: in a thread if that is long."""
    return await asyncio.to_thread(work) if text_bytes > LARGE_TEXT_BYTES else work()

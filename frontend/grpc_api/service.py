"""drover.v1.Inference: protobuf to and from frontend/generation.py.

Knows neither gRPC's servers nor Ray.

Every method takes one request and returns, or streams, its responses; it fails with an error of
router/errors.py, which `frontend/grpc_api/server.py` turns into a status.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from frontend.answer import AnswerDelta
from frontend.generation import ChatPrompt, Generation, Prompt, TextPrompt, TokenPrompt
from frontend.grpc_api.sampling_fields import answer_params, wire_path
from frontend.resume import Resume
from protos.drover.v1 import inference_pb2 as pb
from router.errors import InvalidArgument
from router.request import FinishReason, RequestLimits

_FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


class InferenceService:
    """The service's methods, under the names that inference.proto gives them."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    async def limits(self) -> RequestLimits:
        """What the router can take."""
        return await self._generation.limits()

    def Generate(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Continue a prompt."""
        return self._answer(request)

    def Chat(self, request: pb.ChatRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Answer a conversation."""
        return self._answer(request)

    async def Tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        """Text to token ids."""
        self._generation.check_model(request.model)
        add_bos = request.add_bos if request.HasField("add_bos") else True
        return pb.TokenizeResponse(token_ids=await self._generation.tokenize(request.text, add_bos=add_bos))

    async def Detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        """Token ids to text."""
        self._generation.check_model(request.model)
        return pb.DetokenizeResponse(text=await self._generation.detokenize(request.token_ids))

    async def GetModelInfo(self, request: pb.GetModelInfoRequest) -> pb.GetModelInfoResponse:
        """What is served, and its limits."""
        self._generation.check_model(request.model)
        card, limits = self._generation.card, await self._generation.limits()
        return pb.GetModelInfoResponse(
            model=card.name,
            vocab_size=limits.vocab_size,
            max_context_tokens=limits.max_context_tokens,
            eos_token_ids=card.eos_token_ids,
            bos_token_id=self._generation.bos_token_id,
            num_layers=card.num_layers,
            num_moe_layers=card.num_moe_layers,
            num_experts=card.num_experts,
            experts_per_token=card.experts_per_token,
            total_parameters=card.total_parameters,
            active_parameters=card.active_parameters,
            dtype=card.dtype,
            has_chat_template=self._generation.has_chat_template,
        )

    async def _answer(self, request: pb.GenerateRequest | pb.ChatRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
        """The messages of all answers; closing this frees all of the call's work."""
        self._generation.check_model(request.model)
        try:
            answers = self._generation.answer(self._prompt(request), answer_params(request), _resume(request))
            async with aclosing(answers) as deltas:
                async for delta in deltas:
                    yield _response(delta)
        except InvalidArgument as error:
            raise InvalidArgument(wire_path(error.field), error.reason) from error

    def _prompt(self, request: pb.GenerateRequest | pb.ChatRequest) -> Prompt:
        if isinstance(request, pb.ChatRequest):
            if not self._generation.has_chat_template:
                name = self._generation.card.name
                raise InvalidArgument(
                    "messages", f"cannot be formatted: model {name!r} has no chat template; call Generate"
                )
            return ChatPrompt([(message.role, message.content) for message in request.messages])
        match request.WhichOneof("prompt"):
            case "text":
                return TextPrompt(request.text)
            case "token_ids":
                return TokenPrompt(request.token_ids.ids)
            case _:
                raise InvalidArgument("prompt", "is not set; give text or token_ids")


def _resume(request: pb.GenerateRequest | pb.ChatRequest) -> Resume | None:
    if not request.HasField("resume"):
        return None
    given = request.resume
    return Resume(given.request_id, [tuple(answer.token_ids) for answer in given.received], given.prompt_logprobs)


def _response(delta: AnswerDelta) -> pb.GenerateResponse:
    response = pb.GenerateResponse(
        request_id=delta.request_id, index=delta.index, text=delta.text, token_ids=delta.token_ids
    )
    for entry in delta.logprobs:
        response.logprobs.add(token_id=entry.token_id, logprob=entry.logprob, top=_alternatives(entry.top))
    for told in delta.prompt_logprobs:
        response.prompt_logprobs.add(token_id=told.token_id, logprob=told.logprob, top=_alternatives(told.top))
    if delta.finish_reason is not None:
        response.finish_reason = _FINISH_REASONS[delta.finish_reason]
    if delta.stop_string is not None:
        response.stop_string = delta.stop_string
    if delta.stop_token_id is not None:
        response.stop_token_id = delta.stop_token_id
    if delta.seed is not None:
        response.seed = delta.seed
    if delta.usage is not None:
        response.usage.prompt_tokens = delta.usage.prompt_tokens
        response.usage.completion_tokens = delta.usage.completion_tokens
        response.usage.cached_tokens = delta.usage.cached_tokens
    return response


def _alternatives(top: tuple[tuple[int, float], ...]) -> list[pb.TokenAlternative]:
    return [pb.TokenAlternative(token_id=token_id, logprob=logprob) for token_id, logprob in top]

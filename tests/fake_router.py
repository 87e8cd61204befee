"""A router without an engine: it says what a test tells it to, and remembers what it was asked."""

import asyncio
import functools
import json
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from tempfile import TemporaryDirectory

from checkpoint.make_tokenizer import byte_letters
from checkpoint.tokenizer import Tokenizer
from frontend.chat_template import ChatTemplate
from frontend.delta_stream import MAX_UNREAD_BYTES, DeltaStream, DeltaStreams
from frontend.router_client import Readiness
from router.request import FinishReason, GenerationRequest, RequestLimits, TokenDelta

BOS, EOS = 256, 257
VOCAB_SIZE = 258

Script = Callable[[GenerationRequest], AsyncGenerator[TokenDelta, None]]


@functools.cache
def byte_tokenizer() -> Tokenizer:
    """Token id = byte, and two special tokens; so a test can write tokens down as bytes."""
    special = [
        {"id": token_id, "content": name, "special": True, "normalized": False}
        | {"lstrip": False, "rstrip": False, "single_word": False}
        for token_id, name in ((BOS, "<|begin|>"), (EOS, "<|end|>"))
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocab = {letter: byte for byte, letter in enumerate(byte_letters())}
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    bos = {"id": "<|begin|>", "ids": [BOS], "tokens": ["<|begin|>"]}
    post_processor = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|begin|>": bos},
    }
    data = {"added_tokens": special, "pre_tokenizer": byte_level, "decoder": byte_level, "model": model}
    data["post_processor"] = post_processor
    with TemporaryDirectory() as directory:
        (Path(directory) / "tokenizer.json").write_text(json.dumps(data))
        (Path(directory) / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|begin|>"}))
        return Tokenizer.open(Path(directory))


# Writes every message as "role: content" on a line of its own.
LINE_TEMPLATE = ChatTemplate(
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "
)


class FakeRouter:
    """A RouterClient that answers with `script`; a test may replace it, or `ready`, at any time.

    requests: those that reached the router, oldest first.
    closed: set when a request's script ended or was cancelled, which is where a real router frees its work.
    endings: how requests are to be counted that were cancelled before their script had ended them.
    """

    def __init__(
        self,
        script: Script | None = None,
        *,
        max_context_tokens: int = 1000,
        max_unread_bytes: int = MAX_UNREAD_BYTES,
    ) -> None:
        self.script = script or says("Hello!")
        self.ready = True
        self.requests: list[GenerationRequest] = []
        self.closed = threading.Event()
        self.endings: list[str] = []
        self._limits = RequestLimits(VOCAB_SIZE, max_context_tokens, frozenset({EOS}))
        self._streams = DeltaStreams(self, max_unread_bytes)
        self._playing: dict[str, asyncio.Task[None]] = {}

    @property
    def unread_bytes(self) -> int:
        return self._streams.unread_bytes

    async def limits(self) -> RequestLimits:
        return self._limits

    async def readiness(self) -> Readiness:
        return Readiness(self.ready, "" if self.ready else "a test said so")

    def generate(self, requests: Sequence[GenerationRequest]) -> DeltaStream:
        return self._streams.new_stream(requests)

    def release(self, call_id: str, keep: str) -> None:
        self._streams.release(call_id, keep)

    def submit(self, request: GenerationRequest) -> None:
        self.requests.append(request)
        self._playing[request.request_id] = asyncio.create_task(self._play(request))

    def cancel(self, request_id: str, ending: str) -> None:
        self.endings.append(ending)
        playing = self._playing.get(request_id)
        if playing is not None:
            playing.cancel()

    async def _play(self, request: GenerationRequest) -> None:
        try:
            async with aclosing(self.script(request)) as deltas:
                async for delta in deltas:
                    self._streams.deliver([delta])
                    if delta.is_last:
                        return
            raise AssertionError("the script ended without a last delta")
        except Exception as error:
            self._streams.deliver([TokenDelta(request.request_id, error=error)])
        finally:
            del self._playing[request.request_id]
            self.closed.set()


def says(text: str, *, tokens_per_delta: int = 1) -> Script:
    """Say `text`, byte by byte, then the end token; or less of it, where max_tokens is smaller.

    What was made already is not said again.
    """

    async def script(request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        token_ids = [*text.encode(), EOS]
        reason = FinishReason.STOP if len(token_ids) <= request.sampling.max_tokens else FinishReason.LENGTH
        token_ids = token_ids[: request.sampling.max_tokens]
        for start in range(len(request.made), len(token_ids), tokens_per_delta):
            end = min(start + tokens_per_delta, len(token_ids))
            last = reason if end == len(token_ids) else None
            yield TokenDelta(request.request_id, tuple(token_ids[start:end]), finish_reason=last, first=start)

    return script


def echoes() -> Script:
    """Say the prompt, special tokens left out."""

    def script(request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        return says(byte_tokenizer().decode(request.prompt_token_ids, skip_special=True), tokens_per_delta=64)(request)

    return script


def says_then_waits(text: str) -> Script:
    """Say `text`, then nothing until the stream is closed."""

    async def script(request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        made = len(request.made)
        yield TokenDelta(request.request_id, tuple(text.encode()[made:]), first=made)
        await asyncio.Event().wait()

    return script


def fails(error: Exception, *, after: str = "") -> Script:
    """Say `after`, then raise."""

    async def script(request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        made = len(request.made)
        if made < len(after.encode()):
            yield TokenDelta(request.request_id, tuple(after.encode()[made:]), first=made)
        raise error

    return script

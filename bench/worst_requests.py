"""How long one hostile request holds up everybody else's streams.

Good streams run beside one worst request at a time, each from a process of its own. Told is the
longest time without a token in any of the good streams.

    python -m bench.worst_requests [--address HOST:PORT] [NAME ...]
"""

import argparse
import asyncio
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from bench.errors import BenchError
from bench.load import GENERATE, message
from bench.process import ROOT, end
from bench.worker import Request

CHECKPOINT = ROOT / "demo" / "drover-demo"
MB = 10**6
STREAMS, STREAM_TOKENS = 4, 1900
AFTERMATH_S = 0.5  # the good streams are watched for so long after the worst request was answered
LIMIT_S = 120.0
KV_BYTES = 64 * 2**20  # small, so that a cache that fills does not look like a leak
SERVER = f"""
import sys
from pathlib import Path
from frontend.in_process.server import serve_checkpoint
from router.kv_budget import KvBudget
with serve_checkpoint(Path(sys.argv[1]), kv_budget=KvBudget(bytes={KV_BYTES})) as address:
    print(address, flush=True)
    sys.stdin.read()
"""


def varint(number: int) -> bytes:
    """A protobuf varint."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def field(number: int, content: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return varint(number << 3 | 2) + varint(len(content)) + content


PROMPT = field(3, field(1, b"\x05\x06\x07"))  # GenerateRequest.token_ids
MESSAGE = field(2, field(1, b"user") + field(2, b"Hi"))  # ChatRequest.messages
# Unknown, so protobuf skips it. What is inside would be no message if it were ChatRequest.messages.
GROUP = varint(1000 << 3 | 3) + field(2, b"\xff" * 11) + varint(1000 << 3 | 4)

WORDS = b"many words "


def _chat(unit: bytes, size: int, *, sampling: bool = False) -> bytes:
    """A conversation with about `size` bytes of one field, of ChatRequest or of its SamplingParams."""
    many = unit * (size // len(unit))
    return MESSAGE + (field(3, many) if sampling else many)


def _biases(size: int) -> bytes:
    return MESSAGE + field(3, b"".join(field(12, b"\x08" + varint(token_id)) for token_id in range(size // 6)))


def _stopped_by(size: int) -> bytes:
    return PROMPT + field(4, field(6, b"\x05" * size) + b"\x08\x01")  # max_tokens 1


def _text(size: int) -> bytes:
    return field(2, WORDS * (size // len(WORDS)))  # of GenerateRequest, TokenizeRequest and ChatMessage


# Method, and a maker of the bytes. The tags are those of inference.proto. Those of 4 MB are about
# as large as a request may be where the context is small.
WORST_REQUESTS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "Chat, 20 MB of empty messages": ("Chat", lambda: _chat(field(2, b""), 20 * MB)),
    "Chat, 20 MB of small messages": ("Chat", lambda: _chat(MESSAGE, 20 * MB)),
    "Chat, 20 MB of stop strings": ("Chat", lambda: _chat(field(14, b"a"), 20 * MB, sampling=True)),
    "Chat, 20 MB of biases": ("Chat", lambda: _biases(20 * MB)),
    "Chat, 20 MB of unknown fields": ("Chat", lambda: _chat(b"\xf2\x07\x00", 20 * MB) + field(1, b"\xff")),
    "Chat, a content of 20 MB": ("Chat", lambda: field(2, field(1, b"user") + _text(20 * MB))),
    "Generate, 60 MB of stop_token_ids": ("Generate", lambda: _stopped_by(60 * MB)),
    "Generate, 60 MB of token_ids": ("Generate", lambda: field(3, field(1, b"\x05" * (60 * MB)))),
    "Generate, a text of 20 MB": ("Generate", lambda: _text(20 * MB)),
    "Tokenize, a text of 20 MB": ("Tokenize", lambda: _text(20 * MB)),
    "Detokenize, 20 MB of token_ids": ("Detokenize", lambda: field(2, b"\x05" * (20 * MB))),
    "Chat, 4 MB of empty messages": ("Chat", lambda: _chat(field(2, b""), 4 * MB)),
    "Chat, 4 MB of unknown fields": ("Chat", lambda: _chat(b"\xf2\x07\x00", 4 * MB) + field(1, b"\xff")),
    "Chat, 4 MB of messages behind a group": ("Chat", lambda: GROUP + _chat(field(2, b""), 4 * MB)),
    "Chat, 4 MB of biases": ("Chat", lambda: _biases(4 * MB)),
    "Generate, 4 MB of stop_token_ids": ("Generate", lambda: _stopped_by(4 * MB)),
    "Tokenize, a text of 4 MB": ("Tokenize", lambda: _text(4 * MB)),
    "Detokenize, 4 MB of token_ids": ("Detokenize", lambda: field(2, b"\x05" * (4 * MB))),
    "Generate, a gzip bomb of 250 MB": ("Generate", lambda: field(2, bytes(250 * MB))),
    "Tokenize, a gzip bomb of 250 MB": ("Tokenize", lambda: field(2, bytes(250 * MB))),
}


@dataclass(frozen=True)
class Outcome:
    """gap_s: the others' longest time without a token. status, details: what the worst request got."""

    gap_s: float
    took_s: float
    status: str
    details: str


@contextmanager
def a_server(checkpoint: Path = CHECKPOINT) -> Iterator[tuple[str, int]]:
    """The whole of Drover in a process of its own, without Ray; gives address and process id."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(checkpoint)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().decode().strip()
        if not address:
            raise BenchError(f"no server of {checkpoint}; its error is above")
        yield address, process.pid
    finally:
        end(process)


def send(address: str, name: str) -> tuple[str, str, float]:
    """Send a worst request and read whatever comes: status, details, seconds."""
    method, make = WORST_REQUESTS[name]
    raw = make()
    compression = grpc.Compression.Gzip if "gzip" in name else None
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(address, options=options) as channel:
        grpc.channel_ready_future(channel).result(LIMIT_S)
        call: Any = channel.unary_stream(f"{GENERATE.rpartition('/')[0]}/{method}")  # a unary answer is a stream of one
        began_s = time.perf_counter()
        try:
            for _ in call(raw, timeout=LIMIT_S, compression=compression):
                pass
        except grpc.RpcError as error:
            return error.code().name, error.details() or "", time.perf_counter() - began_s
        return "OK", "", time.perf_counter() - began_s


async def _good_streams(address: str, gaps: list[float]) -> None:
    """STREAMS streams of tokens without end. gaps: gets the time before each token, of all streams."""
    generate = message(Request([5, 6, 7], STREAM_TOKENS))

    async def one() -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            call: Any = channel.unary_stream(GENERATE)
            while True:
                last_s = time.perf_counter()
                async for _ in call(generate):
                    now_s = time.perf_counter()
                    gaps.append(now_s - last_s)
                    last_s = now_s

    await asyncio.gather(*(one() for _ in range(STREAMS)))


async def _measure(address: str, name: str, attacker: ProcessPoolExecutor) -> Outcome:
    gaps: list[float] = []
    streams = asyncio.create_task(_good_streams(address, gaps))
    try:
        while len(gaps) < 20 * STREAMS and not streams.done():
            await asyncio.sleep(0.02)
        gaps.clear()
        status, details, took_s = await asyncio.get_running_loop().run_in_executor(attacker, send, address, name)
        counted = len(gaps)
        # A stream that stands still shows its gap with its next token only.
        deadline_s = time.perf_counter() + LIMIT_S
        await asyncio.sleep(AFTERMATH_S)
        while len(gaps) < counted + 2 * STREAMS and time.perf_counter() < deadline_s and not streams.done():
            await asyncio.sleep(0.02)
        if streams.done():
            streams.result()
        return Outcome(max(gaps, default=LIMIT_S), took_s, status, details)
    finally:
        streams.cancel()
        await asyncio.gather(streams, return_exceptions=True)


def measure(address: str, names: Iterable[str] = WORST_REQUESTS) -> Iterator[tuple[str, Outcome]]:
    """Each worst request once, beside good streams."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as attacker:
        for name in names:
            yield name, asyncio.run(_measure(address, name, attacker))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="worst requests; default: all")
    parser.add_argument("--address", help="a running server; default: the embedded model, without Ray")
    arguments = parser.parse_args()

    def tell(address: str) -> None:
        for name, outcome in measure(address, arguments.names or WORST_REQUESTS):
            print(
                f"{name:36} gap {outcome.gap_s:6.2f} s  answered after {outcome.took_s:6.2f} s  "
                f"{outcome.status} {outcome.details[:90]}",
                flush=True,
            )

    if arguments.address:
        tell(arguments.address)
    else:
        with a_server() as (address, _):
            tell(address)


if __name__ == "__main__":
    main()

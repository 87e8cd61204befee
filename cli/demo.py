"""`drover demo`: the whole system in a minute. Serves a small model, talks to it, and stops."""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cli.arguments import whole
from cli.connect import EMBEDDED
from cli.output import Answer, show
from client import Client, DeltaStream, Message

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

DESCRIPTION = """\
Serve a small model on this machine, talk to it over gRPC, print its answers
and their speed, and stop.

The default is the embedded model. It has Maverick's shape: 128 experts in every
second layer. It was trained on scripture, novels, dictionaries and
documentation (demo/README.md). It knows a glossary of four hundred words by
heart, and continues texts in the style of its books.

With --checkpoint or --prompt there is no chat, only texts to continue.
"""
EPILOG = """\
examples:
  drover demo
  drover demo --shards 5
  drover demo --prompt "And it came to pass" --max-tokens 200
  drover demo --checkpoint /models/my-llama4 --prompt "Once upon a time"
"""
# The first three are in the embedded model's glossary, in the words it was trained with. The
# fourth is not.
QUESTIONS = (
    "What is photosynthesis?",
    "What is expert parallelism?",
    "What is the capital of France?",
    "What is a narwhal?",
)
EMBEDDED_PROMPTS = (
    "And it came to pass",
    "Elizabeth was surprised, but",
    "lighthouse (noun):",
    "The following example shows how to",
)
PROMPTS = ("Once upon a time", "The capital of France is", "def fibonacci(n):")


def add_parser(subparsers: "Subparsers") -> None:
    """Add `drover demo` to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="see the whole system work on this machine",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="serve this Hugging Face Llama 4 directory instead"
    )
    parser.add_argument(
        "--shards", type=whole(1), default=2, metavar="N", help="number of expert shards; default: %(default)s"
    )
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="a text to continue, instead of the built-in ones; may be repeated",
    )
    parser.add_argument(
        "--max-tokens", type=whole(1), default=48, metavar="N", help="tokens per answer, at most; default: %(default)s"
    )
    parser.add_argument("--port", type=whole(1, 65535), metavar="PORT", help="port of gRPC; default: a free one")
    parser.set_defaults(json=False, stats=True)


@dataclass(frozen=True)
class _Served:
    """start_s: seconds from creating the actors until the model answers."""

    name: str
    address: str
    start_s: float


def run(args: argparse.Namespace) -> int:
    """Start, speak, stop."""
    from cli.serve import exit_code, serving
    from cluster.config import parse_deployment
    from cluster.free_ports import free_ports

    # SIGTERM ends the demo like Ctrl-C, and both do in a shell's background, too.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    began = time.monotonic()
    grpc_port, http_port = free_ports(2)
    checkpoint = EMBEDDED if args.checkpoint is None else args.checkpoint
    config = parse_deployment(
        {
            "checkpoint": os.path.abspath(checkpoint),
            "ray": {"namespace": "drover-demo"},
            "shards": {"count": args.shards, "cpus": round(1 / args.shards, 3)},
            "frontend": {"grpc_port": args.port or grpc_port, "http_port": http_port},
        },
        "the demo",
    )
    with serving(config, "quietly") as (child, control):
        line = control.makefile().readline()
        if not line:
            child.wait()
            return exit_code(child) or 1  # it has said why
        served = _Served(**json.loads(line))
        print(f"\n{served.name} is served on {served.address} by 1 router and {args.shards} shards\n", flush=True)
        answers = _speak(served, args)
        _summarize(answers, served, time.monotonic() - began)
    print("stopped, nothing left running")
    return 0


def _speak(served: _Served, args: argparse.Namespace) -> list[Answer]:
    """A chat, if the embedded model runs and no prompt is given; then the prompts."""
    embedded = args.checkpoint is None and not args.prompt
    answers = []
    with Client(served.address) as client:
        if embedded:
            print("A chat, each answer the likeliest:\n", flush=True)
            conversation: list[Message] = []
            for question in QUESTIONS:
                conversation.append(Message("user", question))
                print(f"> {question}", flush=True)
                answers.append(
                    _show(partial(client.chat, conversation, max_tokens=args.max_tokens, temperature=0), args)
                )
                conversation.append(Message("assistant", answers[-1].text))
            print("Texts continued, sampled as the checkpoint proposes:\n", flush=True)
        for prompt in args.prompt or (EMBEDDED_PROMPTS if embedded else PROMPTS):
            print(f"> {prompt}", flush=True)
            answers.append(_show(partial(client.generate, prompt, max_tokens=args.max_tokens, seed=1), args))
    return answers


def _show(start: Callable[[], DeltaStream], args: argparse.Namespace) -> Answer:
    answer = Answer()
    show(start, [answer], args)
    sys.stderr.flush()
    print(flush=True)
    return answer


def _summarize(answers: list[Answer], served: _Served, total_s: float) -> None:
    first_ms = sorted(answer.ttft_ms for answer in answers if answer.ttft_ms is not None)
    speeds = sorted(answer.tokens_per_s for answer in answers if answer.tokens_per_s is not None)
    print(f"start time            {served.start_s:8.1f} s      (actors, weights, links and the gRPC port)")
    if first_ms:
        print(f"time to first token   {first_ms[len(first_ms) // 2]:8.1f} ms     (median of {len(first_ms)} prompts)")
    if speeds:
        print(f"decoding              {speeds[len(speeds) // 2]:8.1f} tokens/s (median, one stream)")
    print(f"in all                {total_s:8.1f} s      (from the command to here)")

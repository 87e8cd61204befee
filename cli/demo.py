"""`drover demo`: a small checkpoint, served on this machine, spoken to, and stopped: the whole system in a minute."""

import argparse
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cli.output import Answer, show
from client import Client

if TYPE_CHECKING:
    from cluster.launch import Deployment

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

DESCRIPTION = """\
Serve a small checkpoint on this machine, send prompts over gRPC, print the streamed answers and their speed, and stop.

Without --checkpoint, a random one of Maverick's shape (128 experts in every second layer) is made once and kept in
.demo/: its text is noise, but every part is real.
"""
EPILOG = """\
examples:
  drover demo
  drover demo --shards 5
  drover demo --checkpoint /models/my-llama4 --prompt "The capital of France is"
"""
DEPLOYMENT = Path(__file__).parent.parent / "deploy" / "local.yaml"
PROMPTS = ("Once upon a time", "The capital of France is", "def fibonacci(n):")


def add_parser(subparsers: "Subparsers") -> None:
    """Add `drover demo` to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="see all of it work on this machine",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="serve this instead of a random one")
    parser.add_argument("--shards", type=int, default=2, metavar="N", help="expert shards; default: %(default)s")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="instead of the usual ones; may be repeated")
    parser.add_argument("--max-tokens", type=int, default=48, metavar="N", help="per answer; default: %(default)s")
    parser.add_argument("--port", type=int, metavar="PORT", help="of gRPC; default: a free one")
    parser.set_defaults(json=False, stats=True)


def run(args: argparse.Namespace) -> int:
    """Start, speak, stop."""
    from cli.progress import StartProgress
    from cli.serve import interrupt_on_signals
    from cluster import launch, ray_runtime
    from cluster.config import load_deployment

    ending = threading.Event()
    interrupt_on_signals(ending)
    began = time.monotonic()
    checkpoint = (args.checkpoint or _random_checkpoint(Path(".demo") / "checkpoint")).resolve()
    ports = [args.port or free_port(), free_port()]
    overrides = [
        f"checkpoint={checkpoint}",
        f"shards.count={args.shards}",
        f"shards.cpus={1 / max(args.shards, 1):.3f}",
        f"frontend.grpc_port={ports[0]}",
        f"frontend.http_port={ports[1]}",
        "ray.namespace=drover-demo",
    ]
    if args.checkpoint is None:
        overrides.append("model_name=random-demo")
    config = load_deployment(DEPLOYMENT, overrides)
    try:
        with StartProgress() as progress:
            deployment = launch.start(config, progress)
        interrupt_on_signals(ending)  # again: Ray has put in handlers of its own
        print(f"\n{config.name} is served on {deployment.address} by 1 router and {args.shards} shards\n", flush=True)
        answers = _speak(deployment, args)
        _summarize(answers, deployment, time.monotonic() - began)
    finally:
        ending.set()
        ray_runtime.disconnect()
    print("stopped, nothing left running")
    return 0


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _random_checkpoint(directory: Path) -> Path:
    from rich.console import Console
    from rich.progress import Progress

    from checkpoint.random_model import SHAPES, write_random_checkpoint

    if (directory / "config.json").exists():
        return directory
    with Progress(console=Console(stderr=True)) as bars:
        bar = bars.add_task("making a random checkpoint", total=None)
        write_random_checkpoint(
            directory,
            SHAPES["demo"],
            overwrite=True,
            on_progress=lambda written, total: bars.update(bar, completed=written, total=total),
        )
    return directory


def _speak(deployment: "Deployment", args: argparse.Namespace) -> list[Answer]:
    answers = []
    with Client(deployment.address) as client:
        for prompt in args.prompt or PROMPTS:
            print(f"> {prompt}", flush=True)
            answer = Answer()
            show(client.generate(prompt, max_tokens=args.max_tokens, seed=1), answer, args)
            answers.append(answer)
            sys.stderr.flush()
            print(flush=True)
    return answers


def _summarize(answers: list[Answer], deployment: "Deployment", total_s: float) -> None:
    first_ms = sorted(answer.ttft_ms for answer in answers if answer.ttft_ms is not None)
    speeds = sorted(answer.tokens_per_s for answer in answers if answer.tokens_per_s is not None)
    print(f"load time             {deployment.load_s:8.1f} s      (actors started and weights read)")
    if first_ms:
        print(f"time to first token   {first_ms[len(first_ms) // 2]:8.1f} ms     (median of {len(first_ms)} prompts)")
    if speeds:
        print(f"decoding              {speeds[len(speeds) // 2]:8.1f} tokens/s (median, one stream)")
    print(f"in all                {total_s:8.1f} s      (from the command to here)")

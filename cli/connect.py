"""Connects `drover generate` and `drover chat` to a server, or to a model in this process."""

import argparse
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

from checkpoint.config import read_config
from checkpoint.errors import DroverError
from cli.arguments import real
from client import DEFAULT_ADDRESS, Client

EMBEDDED = Path(__file__).parent.parent / "demo" / "drover-demo"
# Loopback accepts at once or never.
PROBE_S = 0.3

WHO_ANSWERS = f"""\
Who answers:
  --address HOST:PORT  the server there
  --checkpoint DIR     that model, loaded into this process; needs no server
  neither              the server on {DEFAULT_ADDRESS}, if one listens there;
                       else the small demo model, loaded into this process
"""


def add_connection_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose who answers and how long to wait."""
    server = parser.add_argument_group("who answers")
    who = server.add_mutually_exclusive_group()
    who.add_argument(
        "--address",
        metavar="HOST:PORT",
        help=f"the server to ask; default: {DEFAULT_ADDRESS}, or else the demo model in this process",
    )
    who.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="a Hugging Face Llama 4 directory to load into this process, without a server",
    )
    server.add_argument("--model", default="", metavar="NAME", help="fail unless the model has this name")
    server.add_argument(
        "--timeout-s", type=real(0, above=True), metavar="S", help="give up each answer after S seconds; default: never"
    )


@contextmanager
def connected_client(args: argparse.Namespace) -> Iterator[Client]:
    """A client of the server to ask.

    A server that was started in this process stops when the block ends.
    """
    with _server(args) as address, Client(address) as client:
        yield client


def _server(args: argparse.Namespace) -> AbstractContextManager[str]:
    if args.checkpoint is not None:
        return _in_this_process(args.checkpoint)
    if args.address is not None:
        return nullcontext(args.address)
    if _listens(DEFAULT_ADDRESS):
        return nullcontext(DEFAULT_ADDRESS)
    if not EMBEDDED.is_dir():
        raise DroverError(
            f"no server on {DEFAULT_ADDRESS}, and the embedded demo model is missing ({EMBEDDED}); start one with "
            "`drover serve`, or name a server with --address or a model with --checkpoint"
        )
    print(
        f"no server on {DEFAULT_ADDRESS}; the embedded demo model answers from this process "
        "(--address names a server, --checkpoint another model)",
        file=sys.stderr,
    )
    return _in_this_process(EMBEDDED)


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), PROBE_S).close()
    except OSError:
        return False
    return True


@contextmanager
def _in_this_process(directory: Path) -> Iterator[str]:
    """Serve a checkpoint on loopback. Yields the address.

    The first Ctrl-C ends the block like any exception. If that takes too long, because a large
    model is amid a step, a second Ctrl-C kills the process.
    """
    read_config(directory)  # fails before torch is imported, which takes a second
    with ExitStack() as stack:
        with _status(f"loading {directory.resolve().name}"):
            serve_checkpoint = _serve_checkpoint()
            address = stack.enter_context(serve_checkpoint(directory))
        try:
            yield address
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise


def _serve_checkpoint() -> Callable[..., AbstractContextManager[str]]:
    """Import it in a thread: Ctrl-C during torch's imports could get lost, or print a traceback."""

    def imported() -> Callable[..., AbstractContextManager[str]]:
        from frontend.in_process.server import serve_checkpoint

        return serve_checkpoint

    with ThreadPoolExecutor(1, thread_name_prefix="import") as thread:
        try:
            return thread.submit(imported).result()
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise


def _status(text: str) -> AbstractContextManager[object]:
    """Show a spinner with `text` while the block runs, if stderr is a terminal."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console
    from rich.text import Text

    return Console(stderr=True).status(Text(text))

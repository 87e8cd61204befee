"""`drover chat`: a conversation, one message per line, with a server or without."""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from checkpoint.errors import DroverError
from cli.connect import WHO_ANSWERS, connected_client
from cli.options import add_request_options, check_request_options, sampling_of, utf8
from cli.output import answers_for, show
from client import Client, ClientError, Message

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

DESCRIPTION = f"""\
Talk to the model. One line is one message; the conversation is remembered.

  /reset  forget the conversation, but not --system
  /exit   leave; so does Ctrl-D
  /help   list these commands
  Ctrl-C  stop the answer; between answers: leave

Lines may also come from a pipe. The first error then ends the command.

{WHO_ANSWERS}"""
EPILOG = """\
examples:
  drover chat --system "Answer in one sentence."
  drover chat --checkpoint /models/my-llama4
  printf 'Hello!\\nAnd in French?\\n' | drover chat --json
"""
HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


def add_parser(subparsers: "Subparsers") -> None:
    """Add `drover chat` to the command line."""
    parser = subparsers.add_parser(
        "chat",
        help="talk to the model",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--system", metavar="TEXT", help="the system message: instructions before the conversation")
    add_request_options(parser)


def run(args: argparse.Namespace) -> int:
    """Hold one conversation."""
    check_request_options(args)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    with connected_client(args) as client:
        info = client.model_info(model=args.model, timeout_s=args.timeout_s)
        if not info.has_chat_template:
            raise DroverError(f"{info.model} has no chat template, so it cannot chat; use `drover generate`")
        if interactive:
            print(f"{info.model} is listening; /help lists the commands.", file=sys.stderr)
        conversation = Conversation(client, args)
        for line in _typed_lines() if interactive else _piped_lines():
            if line == "/exit":
                break
            try:
                conversation.take(line)
            except ClientError as error:
                if not interactive:
                    raise
                print(f"drover: error: {error}", file=sys.stderr)
    return 0


class Conversation:
    """The messages so far. Each line is a command or the next message."""

    def __init__(self, client: Client, args: argparse.Namespace) -> None:
        self._client = client
        self._args = args
        self._messages: list[Message] = []
        self._reset()

    def take(self, line: str) -> None:
        """Run a command, or answer a message. A message without an answer is forgotten."""
        if not line.strip():
            return
        if line == "/reset":
            self._reset()
        elif line == "/help":
            print(HELP, file=sys.stderr)
        elif line.startswith("/") and len(line.split()) == 1:
            print(f"unknown command {line}; {HELP}", file=sys.stderr)
        else:
            self._answer(Message("user", line))

    def _reset(self) -> None:
        self._messages = [Message("system", self._args.system)] if self._args.system is not None else []

    def _answer(self, message: Message) -> None:
        args = self._args
        answers = answers_for(args)
        messages = [*self._messages, message]
        start = partial(self._client.chat, messages, model=args.model, timeout_s=args.timeout_s, **sampling_of(args))
        try:
            show(start, answers, args)
        except KeyboardInterrupt:
            print("[stopped]", file=sys.stderr)
        if answers[0].text:  # with -n, the conversation continues with the first answer
            self._messages += [message, Message("assistant", answers[0].text)]


def _typed_lines() -> Iterator[str]:
    try:
        import readline  # noqa: F401  gives input() line editing and history
    except ImportError:
        pass
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _piped_lines() -> Iterator[str]:
    while raw := sys.stdin.buffer.readline():
        yield utf8(raw, "standard input").rstrip("\r\n")

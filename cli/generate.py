"""`drover generate`: continue one prompt, with a server or without."""

import argparse
import sys
from functools import partial
from typing import TYPE_CHECKING

from cli.connect import WHO_ANSWERS, connected_client
from cli.options import add_request_options, check_request_options, sampling_of, token_ids, utf8
from cli.output import answers_for, show

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

DESCRIPTION = f"""\
Continue a prompt, and print the model's tokens as they are made.

The prompt is PROMPT, or --token-ids, or standard input without its last line
end.

{WHO_ANSWERS}"""
EPILOG = """\
examples:
  drover generate "Once upon a time" --max-tokens 40
  drover generate "Once upon a time" --checkpoint /models/my-llama4
  drover generate "Once upon a time" --address 127.0.0.1:9001
  drover generate --token-ids 1,15,7 --temperature 0 --json
  drover generate "A haiku:" -n 3 --temperature 0.8 --top-p 0.9 --stop $'\\n\\n'
  drover generate --max-tokens 200 < prompt.txt > continued.txt
"""


def add_parser(subparsers: "Subparsers") -> None:
    """Add `drover generate` to the command line."""
    parser = subparsers.add_parser(
        "generate",
        help="continue a prompt",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help="the text to continue; default or -: standard input"
    )
    prompt.add_argument(
        "--token-ids",
        type=token_ids,
        metavar="ID,ID",
        help="the prompt as token ids; no beginning-of-text token is added",
    )
    add_request_options(parser)


def run(args: argparse.Namespace) -> int:
    """Stream the answers to stdout."""
    check_request_options(args)
    prompt = args.token_ids if args.token_ids is not None else _text(args.prompt)
    with connected_client(args) as client:
        start = partial(client.generate, prompt, model=args.model, timeout_s=args.timeout_s, **sampling_of(args))
        show(start, answers_for(args), args)
    return 0


def _text(argument: str | None) -> str:
    if argument not in (None, "-"):
        return argument
    if sys.stdin.isatty():
        print("Write the prompt, then Ctrl-D on an empty line.", file=sys.stderr)
    return utf8(sys.stdin.buffer.read(), "standard input").removesuffix("\n").removesuffix("\r")

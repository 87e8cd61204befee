"""The flags that `drover generate` and `drover chat` share, and what they mean for the client."""

import argparse

from checkpoint.errors import DroverError
from cli.connect import add_connection_options
from client import Sampling


def add_request_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags for who answers, the sampling and the output.

    Only what cannot be sent at all is refused here; which values are valid is for the server to say.
    """
    add_connection_options(parser)

    sampling = parser.add_argument_group("sampling (what is left out takes the server's default)")
    sampling.add_argument("--max-tokens", type=int, metavar="N", help="make at most N tokens")
    sampling.add_argument("--temperature", type=float, metavar="T", help="0: the most likely token each time; 1: as is")
    sampling.add_argument("--top-p", type=float, metavar="P", help="choose among the likeliest that add up to P")
    sampling.add_argument("--top-k", type=int, metavar="K", help="choose among the K likeliest; 0: among all")
    sampling.add_argument("--seed", type=int, metavar="N", help="same seed, same prompt, same tokens")
    sampling.add_argument(
        "--stop-token-ids", type=token_ids, default=(), metavar="ID,ID", help="tokens that end the text, too"
    )
    sampling.add_argument(
        "--logprobs", type=int, metavar="N", help="log-probability of each token and of N alternatives; with --json"
    )

    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object per answer instead of streaming it")
    output.add_argument(
        "--stats", action="store_true", help="speed on stderr, even if that is no terminal (--json has it anyway)"
    )
    parser.set_defaults(usage_error=parser.error)


def check_request_options(args: argparse.Namespace) -> None:
    """End with a usage error where flags contradict each other."""
    if args.logprobs is not None and not args.json:
        args.usage_error("--logprobs has nowhere to go without --json")


def sampling_of(args: argparse.Namespace) -> Sampling:
    """The sampling flags as the client's keyword arguments."""
    return Sampling(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        stop_token_ids=args.stop_token_ids,
        logprobs=args.logprobs,
    )


def token_ids(text: str) -> tuple[int, ...]:
    """ "1,2,3" as token ids; an argparse type."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of token ids such as 1,2,3") from None


def utf8(raw: bytes, source: str) -> str:
    """The text of bytes that came from `source`; raises DroverError if they are no UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DroverError(
            f"{source}: is not valid UTF-8 (byte 0x{raw[error.start]:02x} at offset {error.start})"
        ) from None

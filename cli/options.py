"""The flags that `drover generate` and `drover chat` share, and their translation for the client."""

import argparse

from checkpoint.errors import DroverError
from cli.arguments import real, whole
from cli.connect import add_connection_options
from client import Sampling


def add_request_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags for connection, sampling and output.

    Values that no model takes are refused before one is loaded. The server checks what depends on
    the model or on other fields.
    """
    add_connection_options(parser)

    sampling = parser.add_argument_group("sampling (default: the server's)")
    sampling.add_argument("--max-tokens", type=whole(1), metavar="N", help="stop after N tokens")
    sampling.add_argument(
        "--temperature",
        type=real(0),
        metavar="T",
        help="0: always the most likely token; 1: the model's own probabilities; above: more random",
    )
    sampling.add_argument(
        "--top-p",
        type=real(0, 1, above=True),
        metavar="P",
        help="draw from the most likely tokens whose probabilities add up to P; 1: all",
    )
    sampling.add_argument("--top-k", type=whole(0), metavar="K", help="draw from the K most likely tokens; 0: all")
    sampling.add_argument(
        "--seed", type=whole(0, 2**64 - 1), metavar="N", help="the same seed and prompt give the same tokens"
    )
    sampling.add_argument(
        "--stop-token-ids", type=token_ids, default=(), metavar="ID,ID", help="tokens that also end the text"
    )
    sampling.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the text before TEXT (in bash, $'\\n' is a line end); may be repeated",
    )
    sampling.add_argument("--ignore-eos", action="store_true", help="continue after the model's own end tokens")
    sampling.add_argument("--min-tokens", type=whole(0), metavar="N", help="do not end the text before N tokens")
    sampling.add_argument(
        "--min-p", type=real(0, 1), metavar="P", help="skip tokens less than P times as likely as the most likely one"
    )
    sampling.add_argument(
        "--presence-penalty",
        type=real(-2, 2),
        metavar="X",
        help="lower the logit of each token in the answer by X; -2 to 2, 0: off",
    )
    sampling.add_argument(
        "--frequency-penalty", type=real(-2, 2), metavar="X", help="the same, once per occurrence; -2 to 2, 0: off"
    )
    sampling.add_argument(
        "--repetition-penalty",
        type=real(0, above=True),
        metavar="X",
        help="make each token of prompt and answer less likely by a factor X above 1; 1: off",
    )
    sampling.add_argument(
        "--logit-bias",
        type=biases,
        default={},
        metavar="ID=BIAS,...",
        help="add BIAS to the logit of token ID; 100 forces it, -100 bans it",
    )
    sampling.add_argument("-n", type=whole(1), metavar="N", help="give N answers, printed one after the other")
    sampling.add_argument(
        "--logprobs",
        type=whole(0),
        metavar="N",
        help="return the log-probability of each token and of N alternatives; needs --json",
    )
    sampling.add_argument(
        "--prompt-logprobs", type=whole(0), metavar="N", help="the same for each token of the prompt; needs --json"
    )

    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print each answer as one JSON object when it is complete")
    output.add_argument(
        "--stats",
        action="store_true",
        help="print the speed to stderr, even if that is not a terminal (--json includes it)",
    )
    parser.set_defaults(usage_error=parser.error)


def check_request_options(args: argparse.Namespace) -> None:
    """Exit with a usage error if flags contradict each other."""
    for flag, value in (("--logprobs", args.logprobs), ("--prompt-logprobs", args.prompt_logprobs)):
        if value is not None and not args.json:
            args.usage_error(f"{flag} has nowhere to go without --json")


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
        min_p=args.min_p,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        repetition_penalty=args.repetition_penalty,
        logit_bias=args.logit_bias,
        min_tokens=args.min_tokens,
        stop=args.stop,
        ignore_eos=args.ignore_eos or None,
        n=args.n,
        prompt_logprobs=args.prompt_logprobs,
    )


def token_ids(text: str) -> tuple[int, ...]:
    """ "1,2,3" as token ids; an argparse type."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of token ids such as 1,2,3") from None


def biases(text: str) -> dict[int, float]:
    """ "5=-100,7=1.5" as the biases of tokens; an argparse type."""
    pairs = [part.partition("=") for part in text.split(",")]
    try:
        result = {int(token_id): float(bias) for token_id, _, bias in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of biases such as 5=-100,7=1.5") from None
    if len(result) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} names a token twice")
    return result


def utf8(raw: bytes, source: str) -> str:
    """The text of bytes that came from `source`; raises DroverError if they are no UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DroverError(
            f"{source}: is not valid UTF-8 (byte 0x{raw[error.start]:02x} at offset {error.start})"
        ) from None

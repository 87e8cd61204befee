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
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the text before TEXT (in bash $'\\n' is a line end); may be given several times",
    )
    sampling.add_argument("--ignore-eos", action="store_true", help="go on after the model's own end tokens")
    sampling.add_argument("--min-tokens", type=int, metavar="N", help="let nothing end the text before N tokens")
    sampling.add_argument(
        "--min-p", type=float, metavar="P", help="drop what is less than P times as likely as the best"
    )
    sampling.add_argument(
        "--presence-penalty", type=float, metavar="X", help="less of what the answer has already; -2 to 2, 0: off"
    )
    sampling.add_argument(
        "--frequency-penalty", type=float, metavar="X", help="the same for each time that it has it; -2 to 2, 0: off"
    )
    sampling.add_argument(
        "--repetition-penalty", type=float, metavar="X", help="less of what prompt and answer have; above 1, 1: off"
    )
    sampling.add_argument(
        "--logit-bias",
        type=biases,
        default={},
        metavar="ID=BIAS,...",
        help="added to tokens' logits: 100 forces, -100 bans a token",
    )
    sampling.add_argument("-n", type=int, metavar="N", help="give N different answers, one after the other")
    sampling.add_argument(
        "--logprobs", type=int, metavar="N", help="log-probability of each token and of N alternatives; with --json"
    )
    sampling.add_argument(
        "--prompt-logprobs", type=int, metavar="N", help="the same for the tokens of the prompt; with --json"
    )

    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object per answer instead of streaming it")
    output.add_argument(
        "--stats", action="store_true", help="speed on stderr, even if that is no terminal (--json has it anyway)"
    )
    parser.set_defaults(usage_error=parser.error)


def check_request_options(args: argparse.Namespace) -> None:
    """End with a usage error where flags contradict each other."""
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

"""The `drover` command: runs the subcommand, and turns an error into one line and an exit code.

Each subcommand is a module of this folder with the same name. It has two functions:

    add_parser(subparsers)    adds its ArgumentParser with help and an example
    run(args) -> int          runs it; returns the exit code

Nothing is imported before `main` can answer Ctrl-C. Modules are light to import. Heavy packages
(ray, torch) are imported inside `run`, so `drover generate` and `drover --help` start at once, and
work where neither is installed.

Exit codes: 0 success, 1 failure (stderr says why), 2 wrong usage, 130 Ctrl-C, 141 the reader of
stdout has closed it.
"""

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

DESCRIPTION = "Serve Llama 4 class mixture-of-experts models, and talk to them."
EPILOG = """\
examples:
  drover demo                                 # serve, answer, stop: one minute
  drover serve deploy/local.yaml              # in one terminal
  drover chat                                 # in another
  drover generate "The capital of France is" --max-tokens 8

`drover COMMAND --help` explains each command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one `drover` command line; returns its exit code."""
    try:
        if argv is None and sys.argv[1:2] == ["serve"]:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        return _run(argv)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Python flushes stdout once more at exit. Send that to /dev/null, where it cannot fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def commands() -> dict[str, Any]:
    """The modules of the subcommands, in the order of --help."""
    from cli import chat, checkpoint, demo, generate, serve, status, stop

    modules = (serve, generate, chat, status, stop, demo, checkpoint)
    return {module.__name__.removeprefix("cli."): module for module in modules}


def _run(argv: Sequence[str] | None) -> int:
    from checkpoint.errors import DroverError
    from cli.arguments import Parser
    from client import ClientError
    from kernels.openmp import WAITING_THREADS  # imports nothing, and must be set before torch is imported

    for name, value in WAITING_THREADS.items():
        os.environ.setdefault(name, value)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write characters that the terminal cannot
    parser = Parser(
        prog="drover", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in commands().values():
        command.add_parser(subparsers)
    args = parser.parse_args(argv)
    try:
        exit_code: int = commands()[args.command].run(args)
        sys.stdout.flush()
    except (DroverError, ClientError) as error:
        print(f"drover: error: {error}", file=sys.stderr)
        return 1
    return exit_code


if __name__ == "__main__":
    raise SystemExit(main())

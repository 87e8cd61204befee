"""The `drover` command: runs the subcommand, and turns an error into one line and an exit code.

Each subcommand is a module of this folder with the same name. It has two functions:

    add_parser(subparsers)    adds its ArgumentParser with help and an example
    run(args) -> int          runs it; returns the exit code

Modules are light to import. Heavy packages (ray, torch) are imported inside `run`, so `drover
generate` and `drover --help` start at once, and work where neither is installed.

Exit codes: 0 success, 1 failure (stderr says why), 2 wrong usage, 130 Ctrl-C, 141 the reader of
stdout has closed it.
"""

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence

from checkpoint.errors import DroverError
from cli import (
    abort,
    autoscale,
    chat,
    checkpoint,
    demo,
    drain,
    events,
    generate,
    rebalance,
    resize,
    serve,
    simulate,
    status,
    stop,
    undrain,
)
from cli.arguments import Parser
from cli.say import discard_stdout
from client import ClientError

# In the order of --help.
COMMANDS = {
    "serve": serve,
    "generate": generate,
    "chat": chat,
    "status": status,
    "events": events,
    "resize": resize,
    "rebalance": rebalance,
    "abort": abort,
    "autoscale": autoscale,
    "drain": drain,
    "undrain": undrain,
    "stop": stop,
    "simulate": simulate,
    "demo": demo,
    "checkpoint": checkpoint,
}

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
    from kernels.openmp import WAITING_THREADS  # imports nothing, and must be set before torch is imported

    for name, value in WAITING_THREADS.items():
        os.environ.setdefault(name, value)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write characters that the terminal cannot
    parser = Parser(
        prog="drover", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS.values():
        command.add_parser(subparsers)
    try:
        args = parser.parse_args(argv)
        exit_code: int = COMMANDS[args.command].run(args)
        sys.stdout.flush()
    except (DroverError, ClientError) as error:
        print(f"drover: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        discard_stdout()
        return 128 + signal.SIGPIPE
    return exit_code


if __name__ == "__main__":
    raise SystemExit(main())

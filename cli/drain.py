"""`drover drain`: let a router, a shard, or all parts of a node go without losing a request."""

import argparse
import re
import sys
import time
from typing import TYPE_CHECKING

from checkpoint.errors import quoted
from cli.arguments import real
from cli.cluster_options import add_cluster_options, add_json_option, connected_controller, tell

if TYPE_CHECKING:
    from cluster.controller_client import ControllerClient

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

LOOK_S = 0.25
DESCRIPTION = """\
Take a part of a running deployment out of service, and wait until it is gone.

  router-1    gets no new requests. What runs there finishes within the grace
              period, or is moved to another router. Refused for the last one.
  shard-2     is left alone by the routers. Refused while it is the only shard
              that serves some expert (see placement.replicas).
  NODE        all routers and shards there are started anew on other nodes, one
              replica after the other. NODE is an address, a host name, or how
              an id begins; `drover status` shows them. Refused without room.
              What has no replica is away until it has loaded again: its
              requests wait, up to heal_s. Frontend replicas stay.

Draining again what is drained changes nothing. Ctrl-C leaves it draining;
drover undrain brings it back, also when it is gone.

Exit codes: 0 it is gone, or wanted again; 1 refused or failed, stderr says why;
2 wrong usage; 130 Ctrl-C.
"""
EPILOG = """\
examples:
  drover drain router-1
  drover drain router-1 --grace-s 300
  drover undrain router-1
  drover drain 10.0.0.7 --ray-address 10.0.0.1:6379
"""


def add_parser(subparsers: "Subparsers") -> None:
    """Add `drover drain` to the command line."""
    parser = subparsers.add_parser(
        "drain",
        help="take a router, a shard or a node out of service",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", type=part_or_node, metavar="TARGET", help="router-N, shard-N, or a node")
    parser.add_argument(
        "--grace-s",
        type=real(0, 86400),
        default=30.0,
        metavar="SECONDS",
        help="how long a router's requests may go on before they are moved; default: %(default)g",
    )
    parser.add_argument("--undo", action="store_true", help="want it again, as drover undrain does")
    add_json_option(parser)
    add_cluster_options(parser)


def part_or_node(text: str) -> str:
    """An argparse type: what can be drained."""
    from cluster.addresses import TARGET

    if not re.fullmatch(TARGET, text):
        raise argparse.ArgumentTypeError(f"{quoted(text)} is neither a part's name nor a node's")
    return text


def run(args: argparse.Namespace) -> int:
    """Drain and wait, or undo a drain."""
    if args.undo:
        return undo(args)
    with connected_controller(args) as controller:
        controller.drain(args.target, args.grace_s)
        try:
            _wait(controller, args.target)
        except KeyboardInterrupt:
            print(f"\n{args.target} goes on draining; drover undrain {args.target} ends that", file=sys.stderr)
            raise
    tell(args, f"{args.target} is drained", target=args.target, is_drained=True)
    return 0


def undo(args: argparse.Namespace) -> int:
    """Want a drained part again."""
    with connected_controller(args) as controller:
        controller.undo_drain(args.target)
    text = f"{args.target} is wanted again; drover status shows when it serves"
    tell(args, text, target=args.target, is_drained=False)
    return 0


def _wait(controller: "ControllerClient", target: str) -> None:
    """Return once nothing is left there. Meanwhile stderr says what is: a line that changes, or a line per change."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    told = ""
    with console.status(f"draining {target}") as status:  # invisible where stderr is no terminal
        while not (progress := controller.drain_progress(target)).is_done:
            left = "; ".join(f"{name} {what}" for name, what in progress.left.items())
            status.update(Text(f"draining {target}: {left}" if left else f"draining {target}"))
            if not console.is_terminal and (without_seconds := re.sub(r"\d+ s ", "", left)) != told:
                told = without_seconds
                print(left, file=sys.stderr, flush=True)
            time.sleep(LOOK_S)  # the controller answers questions, and calls nobody

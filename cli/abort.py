"""`drover abort`: end an operation."""

import argparse
from typing import TYPE_CHECKING

from cli.cluster_options import add_cluster_options, add_json_option, connected_controller, tell

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

DESCRIPTION = """\
End a resize or rebalancing that runs. A resize goes back to what was before; of
a rebalancing, what is committed stays. All goes on serving. drover status shows
the operation's name, and drover events how it has ended.
"""
EPILOG = """\
example:
  drover abort resize-3f9c01ab
"""


def add_parser(subparsers: "Subparsers") -> None:
    """Add `drover abort` to the command line."""
    parser = subparsers.add_parser(
        "abort",
        help="end a resize or rebalancing that runs",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("operation", metavar="OPERATION", help="its name")
    add_json_option(parser)
    add_cluster_options(parser)


def run(args: argparse.Namespace) -> int:
    """End it."""
    with connected_controller(args) as controller:
        controller.abort(args.operation)
    tell(args, f"{args.operation} ends", operation_id=args.operation, is_aborted=True)
    return 0

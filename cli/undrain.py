"""`drover undrain`: want a drained part, or a node's parts, again."""

import argparse
from typing import TYPE_CHECKING

from cli.cluster_options import add_cluster_options, add_json_option
from cli.drain import part_or_node, undo

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

DESCRIPTION = """\
Bring a drained router, a drained shard, or the parts of a drained node back,
whether they are gone already or not. They serve once they have loaded.
"""
EPILOG = """\
examples:
  drover undrain router-1
  drover undrain 10.0.0.7 --ray-address 10.0.0.1:6379
"""


def add_parser(subparsers: "Subparsers") -> None:
    """Add `drover undrain` to the command line."""
    parser = subparsers.add_parser(
        "undrain",
        help="bring back what was drained",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", type=part_or_node, metavar="TARGET", help="router-N, shard-N, or a node")
    add_json_option(parser)
    add_cluster_options(parser)


def run(args: argparse.Namespace) -> int:
    """Want it again."""
    return undo(args)

"""`drover stop`: remove a running deployment."""

import argparse
import sys
from typing import TYPE_CHECKING

from cli.cluster_options import add_cluster_options, connected

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

EPILOG = """\
examples:
  drover stop
  drover stop --ray-address 10.0.0.1:6379 --namespace team-a
"""


def add_parser(subparsers: "Subparsers") -> None:
    """Add `drover stop` to the command line."""
    parser = subparsers.add_parser(
        "stop",
        help="stop a running deployment",
        description="Stop a deployment: its frontend, routers and shards.\n\nExits with 1 if nothing runs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_cluster_options(parser)


def run(args: argparse.Namespace) -> int:
    """Stop what runs, and print the names of what was stopped."""
    with connected(args) as is_connected:
        removed = []
        if is_connected:
            from cluster.teardown import stop

            removed = stop(args.namespace)
    from cluster.marked_processes import end_left_over

    if ended := end_left_over():
        removed.append(f"what a killed drover serve had left: {len(ended)} process(es)")
    if not removed:
        print(f"nothing runs in namespace {args.namespace!r}", file=sys.stderr)
        return 1
    print(f"stopped {', '.join(removed)}")
    return 0

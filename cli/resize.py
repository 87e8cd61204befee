"""`drover resize`: change the numbers of shards, routers, frontends and replicas while they serve."""

import argparse
from typing import TYPE_CHECKING

from cli.arguments import whole
from cli.cluster_options import add_cluster_options, connected_controller
from cli.operation import add_operation_options, finish, going_on

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

DESCRIPTION = """\
Change a running deployment's numbers of parts, and wait until that is done.
No request fails or notices.

  --shards N     expert shards. New ones get experts of the others; those that
                 go hand theirs over first. The highest numbers go.
  --routers N    routers. Those that go finish their requests first, or hand
                 them over.
  --replicas N   shards that hold each expert (placement.replicas)
  --frontends N  frontend processes (frontend.replicas)

What is not given stays as it is. The deployment file is not changed. One
operation runs at a time; another is refused with the name of the one that runs.
Refused with the number that does not fit is what cannot work. A new part for
which no node has room waits for one: Ray's autoscaler sees what it needs.

Ctrl-C leaves it going on; drover abort ends it.

Exit codes: 0 done; 1 refused or aborted, stderr says why; 2 wrong usage;
130 Ctrl-C.
"""
EPILOG = """\
examples:
  drover resize --shards 4
  drover resize --routers 2 --replicas 2
  drover resize --shards 3 --operation-id to-3-on-friday --no-wait
  drover resize --shards 3 --operation-id to-3-on-friday     # waits for that one
"""
COUNTS = ("shards", "routers", "replicas", "frontends")


def add_parser(subparsers: "Subparsers") -> None:
    """Add `drover resize` to the command line."""
    parser = subparsers.add_parser(
        "resize",
        help="change the numbers of shards, routers, replicas and frontends",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name in COUNTS:
        parser.add_argument(f"--{name}", type=whole(1, 4096), metavar="N", help="from 1 to 4096")
    add_operation_options(parser)
    add_cluster_options(parser)
    parser.set_defaults(wrong_usage=parser.error)


def run(args: argparse.Namespace) -> int:
    """Begin, and wait for the end."""
    counts = {name: getattr(args, name) for name in COUNTS}
    if all(count is None for count in counts.values()):
        args.wrong_usage("nothing to change: give --shards, --routers, --replicas or --frontends")
    with connected_controller(args) as controller:
        from cluster.addresses import new_operation_id

        operation_id = args.operation_id or new_operation_id("resize")
        with going_on(operation_id):
            controller.resize(operation_id, **counts)
            return finish(controller, operation_id, args)

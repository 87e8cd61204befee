"""`drover events`: what has happened in a deployment, and what happens."""

import argparse
import json
import time
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cli.arguments import whole
from cli.cluster_options import add_cluster_options, connected_controller

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

FOLLOW_S = 0.5
DESCRIPTION = """\
Show what has happened in a running deployment, oldest first: parts that died,
came back, or lost a link; operations, step by step; what autoscaling decided,
with its numbers. The newest 256 events are kept, also when the controller is
started again.
"""
EPILOG = """\
examples:
  drover events
  drover events --follow
  drover events --last 200 --json | grep shard-1
"""


def add_parser(subparsers: "Subparsers") -> None:
    """Add `drover events` to the command line."""
    parser = subparsers.add_parser(
        "events",
        help="show what has happened",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--follow", action="store_true", help="go on with what happens, until Ctrl-C")
    parser.add_argument(
        "--last", type=whole(1, 256), default=30, metavar="N", help="begin with the newest N; default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on each line")
    add_cluster_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print the newest events; with --follow, later ones as they come."""
    with connected_controller(args) as controller, suppress(KeyboardInterrupt):
        number, limit = 0, args.last
        while True:
            for event in controller.events_after(number, limit):
                number = event.number
                print(json.dumps(asdict(event)) if args.json else line(asdict(event)), flush=True)
            if not args.follow:
                return 0
            limit = 256
            time.sleep(FOLLOW_S)  # the controller answers questions, and calls nobody
    return 0


def line(event: dict[str, Any]) -> str:
    """An event as one line, in local time."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time_s"]))
    return f"{when}  {event['kind']:<9}  {event['subject']}: {event['text']}"

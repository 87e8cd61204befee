"""`drover autoscale`: pause or resume what the controller does by itself, or see why it did."""

import argparse
from typing import TYPE_CHECKING

from cli.cluster_options import add_cluster_options, add_json_option, connected_controller, tell

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

DESCRIPTION = """\
Pause or resume autoscaling. While it is paused, the controller rebalances and
scales nothing by itself; drover resize and drover rebalance work. A pause
outlives the controller. drover status says whether there is one.

log prints the newest decisions, also those to do nothing: a JSON object on each
line, with all numbers that it was based on.
"""
EPILOG = """\
examples:
  drover autoscale pause
  drover autoscale resume
  drover autoscale log | tail -1 | python3 -m json.tool
"""


def add_parser(subparsers: "Subparsers") -> None:
    """Add `drover autoscale` to the command line."""
    parser = subparsers.add_parser(
        "autoscale",
        help="pause or resume autoscaling, or see its decisions",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("pause", "resume", "log"), help="what to do")
    add_json_option(parser)
    add_cluster_options(parser)


def run(args: argparse.Namespace) -> int:
    """Pause, resume, or print the log."""
    if args.what == "log":
        with connected_controller(args) as controller:
            for decision in controller.decisions():
                print(decision)
        return 0
    is_paused = args.what == "pause"
    with connected_controller(args) as controller:
        controller.pause_autoscaling(is_paused=is_paused)
    tell(args, "autoscaling is paused" if is_paused else "autoscaling goes on", is_paused=is_paused)
    return 0

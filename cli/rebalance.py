"""`drover rebalance`: place experts anew by the load that was measured."""

import argparse
import json
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING

from cli.cluster_options import add_cluster_options, connected_controller
from cli.operation import add_operation_options, finish, going_on, mebibytes

if TYPE_CHECKING:
    from cluster.controller_client import ControllerClient
    from cluster.reports import RebalanceReport

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

DESCRIPTION = """\
Place experts anew by their measured load: hot ones get copies where slots are
free, and shards get equal work. No request fails or notices.

It says first what it is worth: the imbalance (the most loaded shard's load over
the mean of all, averaged over layers) before and after, the weights that move,
and tokens per second. What is not worth its bytes is not done.

The controller does the same by itself if autoscale.dry_run is off; this
command asks now. Ctrl-C leaves it going on; drover abort ends it.

Exit codes: 0 done, or not worth it; 1 refused or aborted, stderr says why;
2 wrong usage; 130 Ctrl-C.
"""
EPILOG = """\
examples:
  drover rebalance --dry-run          # only say what it would do
  drover rebalance
  drover rebalance --dry-run --json | python3 -m json.tool
"""


def add_parser(subparsers: "Subparsers") -> None:
    """Add `drover rebalance` to the command line."""
    parser = subparsers.add_parser(
        "rebalance",
        help="place experts anew by their measured load",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what it would do")
    add_operation_options(parser)
    add_cluster_options(parser)


def run(args: argparse.Namespace) -> int:
    """Propose, begin, and wait for the end."""
    with connected_controller(args) as controller:
        from cluster.addresses import new_operation_id

        operation_id = args.operation_id or new_operation_id("rebalance")
        with nullcontext() if args.dry_run else going_on(operation_id):
            return _rebalance(controller, operation_id, args)


def _rebalance(controller: "ControllerClient", operation_id: str, args: argparse.Namespace) -> int:
    report = controller.rebalance(operation_id, is_dry_run=args.dry_run)
    begun = bool(report.operation_id)
    if not args.json:
        print("\n".join(_told(report, begun)), flush=True)
    elif not begun:
        print(json.dumps(asdict(report)))
    return finish(controller, report.operation_id, args) if begun else 0


def _told(report: "RebalanceReport", begun: bool) -> list[str]:
    verdict = "is done" if begun else "would be done" if report.is_accepted else "is not worth it"
    return [
        f"imbalance {report.imbalance_before:.3f} -> {report.imbalance_after:.3f}, "
        f"{mebibytes(report.moved_bytes)} to move, worth {report.gain_tok_s:.1f} tokens/s: {verdict}",
        *([report.reason] if report.reason else []),
        *(f"  {move}" for move in report.moves),
    ]

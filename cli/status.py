"""`drover status`: the routers and shards that run, what they hold, their speed, and what is down."""

import argparse
import json
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cli.arguments import real
from cli.cluster_options import add_cluster_options, connected

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

DESCRIPTION = """\
Show a deployment's routers and shards, and how the load is spread over experts.

  tokens/s       average of the last ten seconds
  cached         KV cache that holds prefixes of ended requests; it is evicted
                 when memory is needed
  prefix hits    share of prompt tokens that were found in that cache
  preemptions    requests that gave up their KV cache and are computed again
  replayed       requests taken over from another router, or from an earlier
                 process of this one
  retries        parts of steps that another shard was asked for
  restarts       how often Ray has started the part again
  experts held   (layer, expert) pairs, of those that the shard is to hold
  rows computed  (token, expert) pairs, since the shard started
  links          routers that the shard is connected to; of a router, the shards
                 that it is connected to, and why not to the others
  draining       drover drain has taken the part out of service; drained, it is
                 gone
  load           a bar for each expert of a layer, relative to its hottest one;
                 with many experts, for the hottest of some neighbours
  hottest        that expert, and how many times the mean of its layer it has
  copies         experts that are on more shards than others: "17 on 3"

Below these: what is not well, the operation that runs, and the newest events.

Exits with 1 if nothing runs.
"""
EPILOG = """\
examples:
  drover status
  drover status --watch
  drover status --json | python3 -m json.tool
"""


def add_parser(subparsers: "Subparsers") -> None:
    """Add `drover status` to the command line."""
    parser = subparsers.add_parser(
        "status",
        help="show routers and shards of a running deployment",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_cluster_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object, with more counters")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=real(0.1, 3600),
        const=1.0,
        metavar="SECONDS",
        help="show it again every so many seconds, until Ctrl-C; default: %(const)g",
    )


def run(args: argparse.Namespace) -> int:
    """Print the status as tables, once or again and again, or as JSON."""
    with connected(args) as is_connected:
        status = _read(args.namespace) if is_connected else {"routers": [], "shards": []}
        runs = bool(status["routers"] or status["shards"])
        if args.watch and runs:
            _watch(args)
            return 0
    if args.json:
        print(json.dumps(status))
    elif runs:
        _show(status)
    else:
        from cluster.marked_processes import left_over

        print(f"nothing runs in namespace {args.namespace!r}", file=sys.stderr)
        if left := left_over():
            print(f"left of a killed drover serve: {len(left)} process(es); drover stop ends them", file=sys.stderr)
    return 0 if runs else 1


def _read(namespace: str) -> dict[str, Any]:
    from cluster.status import as_json, read_status

    return as_json(read_status(namespace))


def _show(status: dict[str, Any]) -> None:
    from rich.console import Console

    from cli.status_tables import tables

    console = Console(markup=False)
    for table in tables(status, console.width):
        console.print(table)


def _watch(args: argparse.Namespace) -> None:
    """Until Ctrl-C, show the status anew every args.watch seconds: JSON by the line, or tables in place."""
    from rich.console import Group
    from rich.live import Live

    from cli.status_tables import tables

    with suppress(KeyboardInterrupt):
        if args.json:
            while True:
                print(json.dumps(_read(args.namespace)), flush=True)
                time.sleep(args.watch)
        with Live(auto_refresh=False, vertical_overflow="crop") as live:
            while True:
                live.update(Group(*tables(_read(args.namespace), live.console.width)), refresh=True)
                time.sleep(args.watch)

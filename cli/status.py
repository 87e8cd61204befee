"""`drover status`: the routers and shards that run, what they hold, and their speed."""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from cli.cluster_options import add_cluster_options, connected

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

DESCRIPTION = """\
Show a deployment's routers and shards.

  tokens/s       average of the last ten seconds
  cached         KV cache that holds prefixes of ended requests; it is evicted
                 when memory is needed
  prefix hits    share of prompt tokens that were found in that cache
  preemptions    requests that gave up their KV cache and are computed again
  replayed       requests taken over from another router, or from an earlier
                 process of this one
  rows computed  (token, expert) pairs, since the shard started
  links          routers that the shard is connected to

Exits with 1 if nothing runs.
"""
EPILOG = """\
examples:
  drover status
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


def run(args: argparse.Namespace) -> int:
    """Print the status as tables, or as JSON."""
    with connected(args) as is_connected:
        status: dict[str, Any] = {"routers": [], "shards": []}
        if is_connected:
            from cluster.status import as_json, read_status

            status = as_json(read_status(args.namespace))
    if args.json:
        print(json.dumps(status))
    elif status["routers"] or status["shards"]:
        _show(status)
    else:
        from cluster.marked_processes import left_over

        print(f"nothing runs in namespace {args.namespace!r}", file=sys.stderr)
        if left := left_over():
            print(f"left of a killed drover serve: {len(left)} process(es); drover stop ends them", file=sys.stderr)
    return 0 if status["routers"] or status["shards"] else 1


def _show(status: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    routers = Table("router", "state", "running", "waiting", "tokens made", "tokens/s")
    caches = Table("KV cache of", "used", "cached", "free", "prefix hits")
    again = Table("computed again by", "preemptions", "replayed")
    for router in status["routers"]:
        engine = router.get("engine") or {}
        cells = (engine.get("running", ""), engine.get("waiting", ""), engine.get("generated_tokens", ""))
        routers.add_row(router["name"], _state(router), *map(str, cells), f"{router.get('tokens_per_s', 0):.1f}")
        if engine:
            caches.add_row(router["name"], *_cache_cells(engine))
            again.add_row(router["name"], str(engine["preemptions"]), str(engine["replayed"]))
    shards = Table("shard", "state", "experts held", "rows computed", "links")
    for shard in status["shards"]:
        cells = (shard.get("experts_held", ""), shard.get("rows_computed", ""), len(shard.get("links", ())))
        shards.add_row(shard["name"], _state(shard), *map(str, cells))
    console = Console(markup=False)  # errors hold brackets
    console.print(routers)
    if caches.row_count:
        console.print(caches)
        console.print(again)
    console.print(shards)


def _cache_cells(engine: dict[str, Any]) -> tuple[str, ...]:
    used, cached, total = (engine[f"kv_bytes_{which}"] for which in ("used", "cached", "total"))
    queried, hit = engine["prefix_queried_tokens"], engine["prefix_hit_tokens"]
    hits = f"{hit / queried:.0%} of {queried}" if queried else "no prompts yet"
    return _mebibytes(used), _mebibytes(cached), _mebibytes(total - used - cached), hits


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size < 100 * 2**20 else f"{size / 2**20:.0f} MiB"


def _state(part: dict[str, Any]) -> str:
    down = "; ".join(f"{name}: {reason}" for name, reason in part.get("down", {}).items())
    again = "" if part.get("retry_s") is None else f"next try in {part['retry_s']:.0f} s"
    return " - ".join(text for text in (part["phase"], part["error"], again, down) if text)

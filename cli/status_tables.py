"""A deployment's status as tables on a terminal."""

from typing import Any

from rich.table import Table
from rich.text import Text


def tables(status: dict[str, Any]) -> list[Table | Text]:
    """The tables of what cluster.status.as_json tells."""
    routers = Table("router", "node", "state", "running", "waiting", "tokens made", "tokens/s")
    caches = Table("KV cache of", "used", "cached", "free", "prefix hits")
    again = Table("computed again by", "preemptions", "replayed", "retries", "restarts")
    links = Table("links of", "up", "down")
    for router in status["routers"]:
        engine = router.get("engine") or {}
        cells = (engine.get("running", ""), engine.get("waiting", ""), engine.get("generated_tokens", ""))
        speed = f"{router['tokens_per_s']:.1f}" if "tokens_per_s" in router else ""
        _add(routers, router["name"], router.get("node", ""), _state(router), *cells, speed)
        if engine:
            _add(caches, router["name"], *_cache_cells(engine))
            retries, restarts = sum(router.get("retries", {}).values()), router.get("restarts", 0)
            _add(again, router["name"], engine["preemptions"], engine["replayed"], retries, restarts)
        if "down" in router:
            _add(links, router["name"], *_link_cells(router, status["shards"]))
    shards = Table("shard", "node", "state", "experts held", "rows computed", "links", "restarts")
    for shard in status["shards"]:
        counts = (shard.get("rows_computed", ""), len(shard.get("links", ())), shard.get("restarts", 0))
        _add(shards, shard["name"], shard.get("node", ""), _state(shard), _held(shard), *counts)
    shown: list[Table | Text] = [table for table in (routers, caches, again, links, shards) if table.row_count]
    return shown + _notes(status)


def _add(table: Table, *cells: object) -> None:
    table.add_row(*(Text(str(cell)) for cell in cells))  # as Text: errors hold brackets, which are no markup


def _link_cells(router: dict[str, Any], shards: list[dict[str, Any]]) -> tuple[str, str]:
    down, since_s, slow = router["down"], router.get("down_s", {}), router.get("slow", {})
    absent = {*down, *router.get("drained", ())}
    up = sum(shard["name"] not in absent for shard in shards)
    reasons = [
        f"{name}{f' for {since_s[name]:.0f} s' if name in since_s else ''}: {reason}" for name, reason in down.items()
    ]
    reasons += [f"{name}: drained" for name in router.get("drained", ())]
    reasons += [f"{name}: {ratio:g} times as slow as the fastest" for name, ratio in slow.items()]
    return f"{up} of {len(shards)}", "; ".join(reasons)


def _held(shard: dict[str, Any]) -> str:
    if "experts_held" not in shard:
        return ""
    wanted = shard.get("experts_wanted")
    return str(shard["experts_held"]) if wanted is None else f"{shard['experts_held']} of {wanted}"


def _notes(status: dict[str, Any]) -> list[Table | Text]:
    notes = [
        f"{router['name']} is degraded: {router['degraded']}" for router in status["routers"] if router.get("degraded")
    ]
    controller = status.get("controller")
    if controller is not None:
        notes += [f"Node {node[:12]} is drained." for node in controller["cleared"]]
    elif "controller" in status:
        notes.append("The controller does not answer. What runs goes on.")
    return [Text(note) for note in notes]


def _cache_cells(engine: dict[str, Any]) -> tuple[str, ...]:
    used, cached, total = (engine[f"kv_bytes_{which}"] for which in ("used", "cached", "total"))
    queried, hit = engine["prefix_queried_tokens"], engine["prefix_hit_tokens"]
    hits = f"{hit / queried:.0%} of {queried}" if queried else "no prompts yet"
    return _mebibytes(used), _mebibytes(cached), _mebibytes(total - used - cached), hits


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size < 100 * 2**20 else f"{size / 2**20:.0f} MiB"


def _state(part: dict[str, Any]) -> str:
    again = "" if part.get("retry_s") is None else f"next try in {part['retry_s']:.0f} s"
    runs = f"{part['open_requests']} requests left" if part["phase"] == "draining" and "open_requests" in part else ""
    return " - ".join(text for text in (part["phase"], part["error"], again, runs) if text)

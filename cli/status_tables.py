"""A deployment's status as tables on a terminal."""

from typing import Any

from rich.table import Table
from rich.text import Text

from cli.events import line
from cli.heat import heat_table
from cli.operation import mebibytes, words

BESIDE_BARS = 64  # letters of a line of the heat table that are no bars


def tables(status: dict[str, Any], width: int = 80) -> list[Table | Text]:
    """The tables of what cluster.status.as_json tells, for a terminal with so many columns."""
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
    load = status.get("load")
    heat = heat_table(load["layers"], load["age_s"], max(width - BESIDE_BARS, 16)) if load else None
    return shown + ([heat] if heat else []) + _notes(status)


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
        notes += _controller_notes(controller)
    elif "controller" in status:
        notes.append("The controller does not answer. What runs goes on.")
    if events := status.get("events"):
        notes += ["Newest events:", *(f"  {line(event)}" for event in events)]
    return [Text(note) for note in notes]


def _controller_notes(controller: dict[str, Any]) -> list[str]:
    from cluster.reports import OperationStatus

    notes = [f"Node {node[:12]} is drained." for node in controller["cleared"]]
    if operation := controller.get("operation"):
        notes.append(words(OperationStatus(**operation)))
    notes += [f"{part}: {problem}" for part, problem in controller["problems"].items()]
    if controller.get("autoscaling") == "paused":
        notes.append("Autoscaling is paused; drover autoscale resume ends that.")
    elif controller.get("autoscaling") == "dry run":
        notes.append("Autoscaling only says what it would do (autoscale.dry_run).")
    admin = controller.get("admin") or {}
    if admin.get("problem"):
        notes.append(f"Admin is not served: {admin['problem']}")
    return notes


def _cache_cells(engine: dict[str, Any]) -> tuple[str, ...]:
    used, cached, total = (engine[f"kv_bytes_{which}"] for which in ("used", "cached", "total"))
    queried, hit = engine["prefix_queried_tokens"], engine["prefix_hit_tokens"]
    hits = f"{hit / queried:.0%} of {queried}" if queried else "no prompts yet"
    return mebibytes(used), mebibytes(cached), mebibytes(total - used - cached), hits


def _state(part: dict[str, Any]) -> str:
    again = "" if part.get("retry_s") is None else f"next try in {part['retry_s']:.0f} s"
    runs = f"{part['open_requests']} requests left" if part["phase"] == "draining" and "open_requests" in part else ""
    return " - ".join(text for text in (part["phase"], part["error"], again, runs) if text)

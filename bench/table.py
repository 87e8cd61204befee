"""The results for reading: tables of medians, on the terminal and as Markdown for the README."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from bench.results import ratios
from bench.systems import DROVER, LLAMA_CPP, ONE_PROCESS, VLLM

_COLUMNS = (
    "streams",
    "system",
    "decode\ntok/s",
    "min-max",
    "prefill\ntok/s",
    "TTFT ms\np50 / p99",
    "ITL ms\np50 / p99",
)
# Of decode tok/s, as multiples.
_RATIOS = {LLAMA_CPP: "/ llama.cpp", VLLM: "/ vLLM", ONE_PROCESS: "/ 1 process", "floor": "/ floor"}


def rows(results: Mapping[str, Any]) -> list[list[str]]:
    """The closed loop's table: one row per system and concurrency, one for the floor; the ratios are of decode."""
    table, floors = [], {floor["concurrency"]: floor for floor in results["floor"]}
    shown = None
    for run in results["runs"]:
        streams = run["concurrency"]
        if streams != shown and shown is not None:
            table.append(_floor_row(floors.get(shown)))
        parts = ratios(results, streams, run["system"])
        table.append(
            [
                str(streams) if streams != shown else "",
                run["system"],
                f"{run['decode_tok_s']:.0f}",
                f"{run['decode_tok_s_min']:.0f}-{run['decode_tok_s_max']:.0f}",
                f"{run['prefill_tok_s']:.0f}",
                f"{run['ttft_ms_p50']:.0f} / {run['ttft_ms_p99']:.0f}",
                f"{run['itl_ms_p50']:.1f} / {run['itl_ms_p99']:.1f}",
                *(f"{parts[name]:.2f}" if name in parts and name != run["system"] else "" for name in _RATIOS),
            ]
        )
        shown = streams
    table.append(_floor_row(floors.get(shown)))
    return [row for row in table if row]


def _floor_row(floor: Mapping[str, Any] | None) -> list[str]:
    if floor is None:
        return []
    return ["", "bandwidth floor", f"{floor['floor_tok_s']:.0f}", *[""] * (len(_COLUMNS) + len(_RATIOS) - 3)]


def show(results: Mapping[str, Any], console: Console) -> None:
    """Print every part that the results hold."""
    machine = results["machine"]
    console.print(f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; {results['date']}")
    tables = []
    if results.get("runs"):
        tables.append(
            _table("Closed loop: 128-token prompts, 128 tokens each", (*_COLUMNS, *_RATIOS.values()), rows(results))
        )
        tables.append(_floor_table(results))
    if results.get("open_loop"):
        tables.append(_open_table(results["open_loop"]))
    if results.get("shards"):
        body = [
            [str(run["shards"]), f"{run['decode_tok_s']:.0f}", f"{run['itl_ms_p50']:.1f}"] for run in results["shards"]
        ]
        title = f"Shards, {results['shards'][0]['concurrency']} streams"
        tables.append(_table(title, ("shards", "decode tok/s", "ITL ms p50"), body))
    console.print(Group(*tables))
    if results.get("long_prompt"):
        long = results["long_prompt"]
        console.print(
            f"{DROVER}, {long['prompt_tokens']:,} tokens beside {long['chats']} chats: first token after "
            f"{long['long_ttft_s']:.0f} s; the chats' inter-token latency p50/p99 goes from "
            f"{long['alone_itl_ms_p50']:.1f}/{long['alone_itl_ms_p99']:.1f} to "
            f"{long['beside_itl_ms_p50']:.1f}/{long['beside_itl_ms_p99']:.1f} ms"
        )
    if results.get("prefix"):
        prefix = results["prefix"]
        console.print(
            f"{DROVER}, prompts that share {prefix['prefix_tokens']} tokens: first token after "
            f"{prefix['cold_ttft_ms_p50']:.0f} ms (cold), {prefix['warm_ttft_ms_p50']:.0f} ms (warm): "
            f"{prefix['cold_over_warm']:.2f} times faster"
        )
    for system, share in results.get("first_token_agreement", {}).items():
        console.print(f"{system}: {share:.0%} of the prompts' first tokens are {DROVER}'s")


def _floor_table(results: Mapping[str, Any]) -> Table:
    body = [
        [
            str(floor["concurrency"]),
            f"{floor['experts_hit']:.1f}" + ("" if floor["experts_hit_measured"] else " (if uniform)"),
            f"{floor['step_bytes'] / 1e6:.0f}",
            f"{floor['bandwidth_gb_s']:.1f}",
            f"{floor['floor_tok_s']:.0f}",
        ]
        for floor in results["floor"]
    ]
    heads = ("streams", "experts hit per MoE layer", "MB per step", "GB/s", "tok/s at most")
    return _table("Bandwidth floor: what a step must read, at the speed measured", heads, body)


def _open_table(objects: list[dict[str, Any]]) -> Table:
    targets = objects[0]["targets"]
    body = [
        [
            f"{run['rate_per_s']:g}",
            f"{run['good']} of {run['requests']}",
            f"{run['goodput_req_s']:.2f}",
            f"{run['goodput_tok_s']:.0f}",
            f"{run['output_tok_s']:.0f}",
            f"{run['ttft_ms_p50']:.0f} / {run['ttft_ms_p99']:.0f}",
            f"{run['itl_ms_p50']:.1f} / {run['itl_ms_p99']:.1f}",
        ]
        for run in objects
        if run["ttft_ms_p50"] is not None and run["itl_ms_p50"] is not None
    ]
    title = f"Open loop, mixed lengths; targets: TTFT {targets['ttft_ms']:g} ms, mean ITL {targets['itl_ms']:g} ms"
    heads = ("req/s", "met targets", "goodput req/s", "goodput tok/s", "all tok/s", _COLUMNS[5], _COLUMNS[6])
    return _table(title, heads, body)


def _table(title: str, heads: tuple[str, ...], body: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for head in heads:
        table.add_column(head, justify="left" if head == "system" else "right", no_wrap=head == "system")
    for row in body:
        table.add_row(*row)
    return table

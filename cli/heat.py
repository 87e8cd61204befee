"""The load of experts as a table: a line for each layer, with as many bars as there is room for."""

import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

BARS = "▁▂▃▄▅▆▇█"
NOTHING = "·"
NAMED_COPIES = 4  # of a layer


def heat_table(layers: Sequence[dict[str, Any]], age_s: float | None, width: int) -> Table | None:
    """The table of what cluster.status.as_json tells under "load"; None if there is nothing to tell.

    width: the longest line of bars. Where a layer has more experts, a bar shows the hottest of some
    neighbours. Bars are relative to the layer's hottest expert.
    """
    is_measured = any(any(layer["load"]) for layer in layers)
    if not is_measured and not any(_extra_copies(layer["copies"]) for layer in layers):
        return None
    age = f", {age_s:.0f} s ago" if is_measured and age_s is not None and age_s >= 1 else ""
    table = Table("layer", f"load of experts{age}" if is_measured else "load of experts: not measured yet")
    table.add_column("hottest")
    table.add_column("copies")
    for layer in layers:
        load, experts = layer["load"], len(layer["copies"])
        line = Text(bars(load or [0.0] * experts, width), no_wrap=True)
        copies = Text(_extra_copies(layer["copies"]))
        table.add_row(Text(str(layer["layer"])), line, Text(_hottest(load), no_wrap=True), copies)
    return table


def bars(load: Sequence[float], width: int) -> str:
    """Loads as bars, at most `width` of them.

    Example: bars([0, 1, 8, 4], 4) is "·▁█▄", and bars([0, 1, 8, 4], 2) is "▁█".
    """
    count = min(len(load), max(width, 1))
    bins = [max(load[len(load) * i // count : len(load) * (i + 1) // count]) for i in range(count)]
    top = max(bins, default=0.0)
    return "".join(BARS[math.ceil(len(BARS) * value / top) - 1] if value > 0 else NOTHING for value in bins)


def _hottest(load: Sequence[float]) -> str:
    """Which expert it is, and how many times the mean of all it has.

    Example: of [1.0, 6.0, 1.0, 0.0] it is "expert 1: 3.0x".
    """
    mean = sum(load) / len(load) if load else 0.0
    if mean <= 0:
        return ""
    expert = max(range(len(load)), key=load.__getitem__)
    return f"expert {expert}: {load[expert] / mean:.1f}x"


def _extra_copies(copies: Sequence[int]) -> str:
    """The experts that are on more shards than others.

    Example: of [1, 1, 3, 2] it is "2 on 3, 3 on 2": expert 2 is on three shards.
    """
    fewest = min(copies, default=0)
    more = sorted((expert for expert, count in enumerate(copies) if count > fewest), key=lambda e: (-copies[e], e))
    told = [f"{expert} on {copies[expert]}" for expert in more[:NAMED_COPIES]]
    if len(more) > NAMED_COPIES:
        told.append(f"{len(more) - NAMED_COPIES} more")
    return ", ".join(told)

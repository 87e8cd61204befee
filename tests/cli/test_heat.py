"""How the load of experts looks: as many bars as there is room for, and who has more copies."""

from typing import Any

import pytest
from rich.console import Console

from cli.heat import bars, heat_table


@pytest.mark.parametrize(
    ("load", "width", "line"),
    [
        ([0.0, 1.0, 8.0, 4.0], 4, "·▁█▄"),
        ([0.0, 1.0, 8.0, 4.0], 99, "·▁█▄"),
        ([0.0, 1.0, 8.0, 4.0], 2, "▁█"),
        ([0.0, 0.0, 0.0], 3, "···"),
        ([5.0, 5.0, 5.0], 2, "██"),
        ([1e-300, 1.0], 2, "▁█"),
        ([0.0] * 127 + [3.0], 16, "·" * 15 + "█"),
        ([], 16, ""),
    ],
)
def test_bars(load: list[float], width: int, line: str) -> None:
    assert bars(load, width) == line


def shown(layers: list[dict[str, Any]], age_s: float | None = 0.5, width: int = 16) -> str:
    table = heat_table(layers, age_s, width)
    if table is None:
        return ""
    console = Console(width=120)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]


def test_a_line_for_each_layer() -> None:
    layers = [
        {"layer": 1, "load": [1.0, 6.0, 1.0, 0.0], "copies": [1, 3, 1, 2]},
        {"layer": 3, "load": [2.0, 2.0, 2.0, 2.0], "copies": [1, 1, 1, 1]},
    ]
    assert cells(shown(layers)) == [
        ["1", "▂█▂·", "expert 1: 3.0x", "1 on 3, 3 on 2"],
        ["3", "████", "expert 0: 1.0x", ""],
    ]


def test_old_numbers_tell_their_age_and_many_copies_are_counted() -> None:
    text = shown([{"layer": 0, "load": [1.0] * 8, "copies": [2] * 6 + [1, 1]}], age_s=42.4)
    assert "load of experts, 42 s ago" in text
    assert cells(text)[0][3] == "0 on 2, 1 on 2, 2 on 2, 3 on 2, 2 more"


def test_what_was_not_measured_is_shown_only_where_copies_differ() -> None:
    assert shown([{"layer": 0, "load": [], "copies": [2, 2]}], age_s=None) == ""
    assert shown([{"layer": 0, "load": [0.0, 0.0], "copies": [1, 1]}]) == ""
    text = shown([{"layer": 0, "load": [], "copies": [2, 1]}], age_s=None)
    assert "not measured yet" in text
    assert cells(text) == [["0", "··", "", "0 on 2"]]


def test_the_table_fits_a_terminal_of_80_columns_with_128_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    from cli.status_tables import tables

    layer = {"layer": 47, "load": [float(e) for e in range(128)], "copies": [1] * 124 + [3, 3, 4, 5]}
    status = {"routers": [], "shards": [], "load": {"age_s": 0.1, "layers": [layer]}}
    [table] = tables(status, 80)
    console = Console(width=80)
    with console.capture() as captured:
        console.print(table)
    first, more = cells(captured.get())
    assert first[:3] == ["47", "▁▁▂▂▃▃▄▄▅▅▆▆▇▇██", "expert 127: 2.0x"]
    assert f"{first[3]} {more[3]}" == "127 on 5, 126 on 4, 124 on 3, 125 on 3"

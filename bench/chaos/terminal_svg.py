"""Frames of a terminal as one SVG that plays itself: no script, so that a README may show it."""

from collections.abc import Sequence
from html import escape
from itertools import groupby

_CHARACTER_PX, _LINE_PX, _MARGIN_PX = 7.8, 17, 12
_INK, _PAPER = "#d8dee9", "#1e222a"
_END_S = 2.0
"""How long the last frame stays before it begins anew."""

Frame = tuple[float, Sequence[str]]
"""When, in seconds, and the lines of the screen."""


def changes(frames: Sequence[Frame]) -> list[Frame]:
    """The frames without those that look like the one before."""
    return [next(alike) for _, alike in groupby(frames, key=lambda frame: [line.rstrip() for line in frame[1]])]


def svg(frames: Sequence[Frame], columns: int, rows: int, highlight: str = "") -> str:
    """A screen of `columns` by `rows` that shows each frame at its time. Lines with `highlight` stand out.

    A line that stays the same over frames is drawn once, visible from its first moment to its last.
    """
    frames = changes(frames)
    began_s, total_s = frames[0][0], frames[-1][0] - frames[0][0] + _END_S
    width, height = columns * _CHARACTER_PX + 2 * _MARGIN_PX, rows * _LINE_PX + 2 * _MARGIN_PX
    styles: list[str] = []
    texts: list[str] = []
    for row in range(rows):
        seen = [(at_s - began_s, lines[row].rstrip() if row < len(lines) else "") for at_s, lines in frames]
        begin = 0
        for text, run in groupby(seen, key=lambda moment: moment[1]):
            count = len(list(run))
            from_s = seen[begin][0]
            begin += count
            until_s = seen[begin][0] if begin < len(seen) else total_s
            if text:
                name = f"l{len(texts)}"
                styles.append(_visible(name, from_s, until_s, total_s))
                colour = ' fill="#ebcb8b" font-weight="bold"' if highlight and highlight in text else ""
                y = _MARGIN_PX + (row + 0.8) * _LINE_PX
                texts.append(
                    f'<text id="{name}" x="{_MARGIN_PX}" y="{y:.0f}"{colour} xml:space="preserve">{escape(text)}</text>'
                )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
            f'viewBox="0 0 {width:.0f} {height}">',
            "<style>",
            "text { font: 13px ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace; }",
            *styles,
            "</style>",
            f'<rect width="100%" height="100%" rx="6" fill="{_PAPER}"/>',
            f'<g fill="{_INK}">',
            *texts,
            "</g>",
            "</svg>",
            "",
        ]
    )


def _visible(name: str, from_s: float, until_s: float, total_s: float) -> str:
    """The style of a line that shows from from_s to until_s, again and again."""
    if from_s <= 0 and until_s >= total_s:
        return f"#{name} {{ }}"
    begin, end = 100 * from_s / total_s, 100 * until_s / total_s
    shown = f"{begin:.2f}%, {end:.2f}% {{ visibility: visible }}"
    hidden = "0% { visibility: hidden } " if begin > 0 else ""
    after = f"{min(end + 0.01, 100):.2f}% {{ visibility: hidden }}" if end < 100 else ""
    return (
        f"@keyframes {name} {{ {hidden}{shown} {after} }} "
        f"#{name} {{ animation: {name} {total_s:.2f}s step-end infinite; visibility: hidden }}"
    )

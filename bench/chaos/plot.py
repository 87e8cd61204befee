"""Draws tokens per second over time with every fault marked, one strip for each mode of the file's first run.

python -m bench.chaos.plot [CHAOS.json [OUT.png]]        # needs `pip install -e '.[bench]'`
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.chaos.results import read
from bench.errors import BenchError
from checkpoint.errors import DroverError

HERE = Path(__file__).parents[1]
_LINE = "#0072B2"
# Okabe and Ito's colours; each target has a letter, too, for whoever cannot tell them apart.
_COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#666666", "#8C564B", "#F0E442")


def draw(found: Mapping[str, Any], path: Path) -> None:
    """One strip per mode. Raises BenchError where matplotlib is missing, or nothing was measured."""
    timelines = found["timelines"]
    if not timelines:
        raise BenchError("no mode was run; `make chaos` runs them")
    try:
        import matplotlib
    except ImportError:
        raise BenchError("matplotlib is not installed; `make bench-plot` installs it") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    figure, axes = plt.subplots(
        len(timelines), 1, figsize=(10.5, 1.5 * len(timelines) + 0.9), layout="constrained", squeeze=False
    )
    targets = list(dict.fromkeys(target for timeline in timelines for target, _ in timeline["faults"]))
    for axis, timeline in zip(axes[:, 0], timelines, strict=True):
        _strip(axis, timeline, targets)
    axes[-1, 0].set_xlabel("seconds")
    letters = ", ".join(f"{_letter(targets, target)} {target}" for target in targets)
    figure.suptitle(f"Tokens per second, all streams; faults: {letters}\n{found['title']}", x=0.01, ha="left")
    # Opaque, so that it reads the same on light and on dark pages.
    figure.savefig(path, dpi=120, facecolor="white")
    plt.close(figure)


def _strip(axis: Any, timeline: Mapping[str, Any], targets: list[str]) -> None:
    seconds, speeds = zip(*timeline["tokens_per_s"], strict=True)
    axis.fill_between(seconds, speeds, color=_LINE, alpha=0.25, linewidth=0)
    axis.plot(seconds, speeds, color=_LINE, linewidth=1.2)
    top = max(*speeds, timeline["speed_before"], 1)
    axis.axhline(timeline["speed_before"], color="#666666", linewidth=0.8, linestyle=":")
    for target, at_s in timeline["faults"]:
        colour = _COLOURS[targets.index(target) % len(_COLOURS)]
        axis.axvline(at_s, color=colour, linewidth=1.2)
        above = axis.get_xaxis_transform()
        axis.text(at_s, 1.02, _letter(targets, target), transform=above, color=colour, ha="center", fontweight="bold")
    axis.set_ylim(0, top * 1.05)
    axis.set_xlim(0, max(seconds))
    axis.set_ylabel(timeline["mode"], rotation=0, ha="right", va="center")


def _letter(targets: list[str], target: str) -> str:
    return "ABCDEFGHIJKLMNOP"[targets.index(target)]


def main() -> int:
    given = [Path(argument) for argument in sys.argv[1:]]
    source = given[0] if given else HERE / "chaos.json"
    target = given[1] if len(given) > 1 else source.with_suffix(".png")
    try:
        draw(read(source)[0], target)
    except (DroverError, OSError) as error:
        print(f"bench.chaos.plot: error: {error}", file=sys.stderr)
        return 1
    print(f"drawn to {target}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

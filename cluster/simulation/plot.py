"""Draws the result of a simulation. matplotlib is not among Drover's requirements."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint.errors import DroverError

# Okabe and Ito's colours, told apart by the colour-blind.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#888888"


def check() -> None:
    """Raise DroverError where matplotlib is missing: before a long run, not after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise DroverError("--plot needs matplotlib; install it with: pip install 'matplotlib>=3.8'") from None


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Four strips over time; what was decided is marked. The file's ending says its format. Raises DroverError."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    series = result["series"]
    time_N = [row["time_s"] for row in series]

    def line(axis: Any, key: str, colour: str, label: str) -> None:
        values = [float("nan") if row[key] is None else row[key] for row in series]
        axis.plot(time_N, values, color=colour, label=label, linewidth=1.4)

    plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    figure, axes = plt.subplots(4, 1, figsize=(9, 8), sharex=True, layout="constrained")
    line(axes[0], "tok_s", _BLUE, "tokens/s")
    line(axes[1], "gap_ms_p50", _BLUE, "gap p50, ms")
    line(axes[1], "gap_ms_p99", _ORANGE, "gap p99, ms")
    line(axes[2], "imbalance", _BLUE, "max / mean rows over shards")
    line(axes[2], "copies", _GREEN, "copies of an expert, mean")
    line(axes[3], "shards", _BLUE, "shards")
    line(axes[3], "routers", _GREEN, "routers")
    moved = axes[3].twinx()
    moved.plot(time_N, [row["moved_bytes"] / 1e6 for row in series], color=_GREY, linestyle="--", linewidth=1.2)
    moved.set_ylabel("moved, MB (dashed)")
    acted = [row for row in result.get("decisions", ()) if row["decision"] != "hold"]
    for axis in axes:
        axis.set_ylim(0, 1.25 * axis.get_ylim()[1])  # with room for the legend
        axis.legend(loc="upper left", frameon=False, ncols=2)
        for row in acted:
            axis.axvline(row["time_s"], color=_GREY, linewidth=0.6, linestyle=":")
    axes[-1].set_xlabel("simulated seconds" + ("; dotted: decisions" if acted else ""))
    try:
        figure.savefig(path, dpi=130, facecolor="white")
    except (OSError, ValueError) as error:
        raise DroverError(f"--plot is {path}, which cannot be written: {error}") from None
    finally:
        plt.close(figure)

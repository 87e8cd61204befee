"""Draws bench/results.json for the README.

python -m bench.plot [RESULTS.json [OUT.png]]        # needs `pip install -e '.[bench]'`
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import results
from bench.errors import BenchError
from bench.systems import DROVER, LLAMA_CPP, ONE_PROCESS, VLLM
from checkpoint.errors import DroverError

HERE = Path(__file__).parent
# Okabe and Ito's colours, told apart by the colour-blind; markers and labels tell the lines apart without any.
_STYLES = {
    DROVER: ("#0072B2", "o", "Drover, cluster"),
    ONE_PROCESS: ("#56B4E9", "s", "Drover, one process"),
    LLAMA_CPP: ("#D55E00", "^", "llama.cpp"),
    VLLM: ("#009E73", "D", "vLLM"),
}
_GREY = "#666666"
_LABEL_GAP = 0.05  # of the axis's height, so that labels at line ends do not overlap


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Decode speed, inter-token latency and, if measured, goodput. Raises BenchError where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        raise BenchError("matplotlib is not installed; `make bench-plot` installs it and draws") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11}
    has_open = bool(found.get("open_loop"))
    figure, axes = plt.subplots(1, 2 + has_open, figsize=(4.9 * (2 + has_open), 4.3), layout="constrained")
    _speed(axes[0], found)
    _latency(axes[1], found)
    if has_open:
        _open_loop(axes[2], found["open_loop"])
    machine = found["machine"]
    model = f"{found['model']['parameters'] / 1e6:.0f} M parameter Llama 4 in bf16"
    figure.suptitle(f"{model} on {machine['cores']} cores of {machine['cpu']}, {found['date'][:10]}", x=0.01, ha="left")
    # Opaque, so that it reads the same on light and on dark pages.
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)


def _lines(found: Mapping[str, Any], key: str) -> dict[str, list[tuple[int, float]]]:
    """(streams, figure) of each system that was measured."""
    lines = {
        name: [(run["concurrency"], run[key]) for run in found["runs"] if run["system"] == name] for name in _STYLES
    }
    return {name: points for name, points in lines.items() if points}


def _speed(axis: Any, found: Mapping[str, Any]) -> None:
    ends = []
    for name, points in _lines(found, "decode_tok_s").items():
        color, marker, label = _STYLES[name]
        axis.plot(*zip(*points, strict=True), color=color, marker=marker, linewidth=2)
        ends.append((points[-1][1], label, color))
    if found.get("floor"):
        floor = [(entry["concurrency"], entry["floor_tok_s"]) for entry in found["floor"]]
        axis.plot(*zip(*floor, strict=True), color=_GREY, linestyle="--", linewidth=1.5)
        ends.append((floor[-1][1], "memory bandwidth", _GREY))
    _streams_axis(axis, found)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("tokens per second, all streams")
    axis.set_title("Decoding speed (higher is better)", loc="left")
    _label_ends(axis, ends)


def _latency(axis: Any, found: Mapping[str, Any]) -> None:
    ends = []
    p99 = _lines(found, "itl_ms_p99")
    for name, points in _lines(found, "itl_ms_p50").items():
        color, marker, label = _STYLES[name]
        streams, median = zip(*points, strict=True)
        axis.plot(streams, median, color=color, marker=marker, linewidth=2)
        axis.plot(*zip(*p99[name], strict=True), color=color, linestyle=":", linewidth=1.2)
        ends.append((median[-1], label, color))
    _streams_axis(axis, found)
    axis.set_yscale("log")
    ticks = [1, 2, 5, 10, 20, 50, 100, 200, 500]
    axis.set_yticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    low = min(value for points in _lines(found, "itl_ms_p50").values() for _, value in points)
    high = max(value for points in p99.values() for _, value in points)
    axis.set_ylim(low / 1.4, high * 1.4)
    axis.set_ylabel("milliseconds between tokens")
    axis.set_title("Inter-token latency: median, dotted p99", loc="left")
    _label_ends(axis, ends)


def _open_loop(axis: Any, runs: list[dict[str, Any]]) -> None:
    rates = [run["rate_per_s"] for run in runs]
    shares = [100 * run["good"] / run["requests"] for run in runs]
    axis.plot(rates, shares, color=_STYLES[DROVER][0], marker="o", linewidth=2)
    for rate, share, run in zip(rates, shares, runs, strict=True):
        text = f"{run['goodput_tok_s']:.0f}\ntok/s"
        axis.annotate(text, (rate, share), (0, 8), textcoords="offset points", ha="center", fontsize=9)
    axis.set_xscale("log", base=2)
    axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axis.minorticks_off()
    axis.margins(x=0.12)
    axis.set_ylim(0, 118)
    axis.set_yticks([0, 25, 50, 75, 100])
    targets = runs[0]["targets"]
    first_s, gap_ms = targets["ttft_ms"] / 1e3, targets["itl_ms"]
    axis.set_xlabel("requests per second that arrive")
    axis.set_ylabel(f"% with first token in {first_s:g} s and {gap_ms:g} ms per token")
    axis.set_title("Drover, open loop: requests in time", loc="left")
    axis.grid(axis="y", alpha=0.3)


def _streams_axis(axis: Any, found: Mapping[str, Any]) -> None:
    streams = sorted({run["concurrency"] for run in found["runs"]})
    axis.set_xscale("log", base=2)
    axis.set_xticks(streams, [str(count) for count in streams])
    axis.minorticks_off()
    axis.set_xlabel("concurrent streams")
    axis.grid(axis="y", alpha=0.3)


def _label_ends(axis: Any, ends: list[tuple[float, str, str]]) -> None:
    """Each line's name at its right end, moved up where the one below is too near."""
    to_height = axis.transAxes.inverted().transform
    below = -1.0
    for value, label, color in sorted(ends):
        height = max(float(to_height(axis.transData.transform((1, value)))[1]), below + _LABEL_GAP)
        axis.text(
            1.02, height, label, transform=axis.transAxes, color=color, va="center", fontweight="bold", fontsize=9
        )
        below = height


def main() -> int:
    given = [Path(argument) for argument in sys.argv[1:]]
    source = given[0] if given else HERE / "results.json"
    target = given[1] if len(given) > 1 else source.with_suffix(".png")
    try:
        draw(results.read(source), target)
    except (DroverError, OSError) as error:
        print(f"bench.plot: error: {error}", file=sys.stderr)
        return 1
    print(f"drawn to {target}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

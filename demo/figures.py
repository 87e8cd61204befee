"""The pictures of demo/README.md."""

from pathlib import Path
from typing import Any

import numpy as np


def draw_expert_load(load_by_kind: dict[str, np.ndarray], path: Path) -> None:
    """A heatmap per MoE layer: rows are kinds of text, columns experts, the fullest first; 1 is an even share.

    load_by_kind: tokens per MoE layer and expert, [L, E].
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(load_by_kind)
    share_KLE = np.stack([load / load.mean(-1, keepdims=True) for load in load_by_kind.values()])
    layers = share_KLE.shape[1]
    figure, axes = plt.subplots(layers, 1, figsize=(11, 1.55 * layers + 1.0), layout="constrained", sharex=True)
    for layer, axis in enumerate(axes):
        order = np.argsort(-share_KLE[:, layer].sum(0))
        image = axis.imshow(share_KLE[:, layer][:, order], aspect="auto", cmap="magma", vmin=0, vmax=6)
        axis.set_yticks(range(len(kinds)), kinds)
        axis.set_title(f"layer {2 * layer + 1} (MoE layer {layer})", fontsize=10, loc="left")
    axes[-1].set_xlabel("the experts, each layer's most used first")
    figure.colorbar(image, ax=axes, label="tokens, in multiples of an even share", extend="max")
    figure.suptitle("Which experts read what: load on validation text")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_comparison(runs: list[dict[str, Any]], path: Path) -> None:
    """Bits per byte of every run over tokens and over processor time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for axis, key, label in ((axes[0], "tokens", "tokens, millions"), (axes[1], "cpu_s", "processor time, minutes")):
        for run in runs:
            scale = 1e6 if key == "tokens" else 60
            first = run["seed"] == 0
            axis.plot(
                [point[key] / scale for point in run["curve"]],
                [point["bits_per_byte"] for point in run["curve"]],
                color="#c0392b" if run["arm"] == "mixture" else "#2c5f8a",
                alpha=1.0 if first else 0.5,
                label=run["arm"] if first else None,
            )
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation, bits per byte")
    axes[0].legend()
    figure.suptitle("128 experts, top-1, against a dense model of the same active parameters, 3 seeds")
    figure.savefig(path, dpi=110)
    plt.close(figure)

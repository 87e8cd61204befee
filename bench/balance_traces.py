"""What experts get to do: made up, published, and recorded.

Legend: P periods, W windows of a period, L MoE layers, E experts, T tokens.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RECORDED = Path(__file__).parents[1] / "demo" / "routing_trace.npz"
LAYERS, EXPERTS = 24, 128
"""Llama 4 Maverick's."""
MAVERICK_BYTES = 3 * 5120 * 8192 * 2
DEMO_BYTES = 3 * 128 * 48 * 2
WINDOWS = 64
FLASHLB = (600.0, 560.0, 120.0, 120.0, 20.0, 10.0, 10.0, 10.0)


@dataclass(frozen=True)
class Trace:
    """planned_PWLE: what is known before each period. met_PWLE: what then comes. expert_bytes: of one expert."""

    name: str
    num_shards: int
    expert_bytes: int
    planned_PWLE: Floats
    met_PWLE: Floats


def traces() -> list[Trace]:
    """All of them; the same every time."""
    flashlb = np.array(FLASHLB)[None, None, None]
    return [
        Trace("FlashLB's example", 8, MAVERICK_BYTES, flashlb, flashlb),
        *(_steady(f"zipf {exponent}", _zipf(exponent), 8) for exponent in (0.5, 1.0)),
        _steady("zipf 1.0, 32 shards", _zipf(1.0), 32),
        _steady("4 hot experts", _hot(4, 0.4), 8),
        _steady("16 hot experts, 32 shards", _hot(16, 0.6), 32),
        _drifting("drifting zipf 1.0", _zipf(1.0), 8),
        *_recorded(),
    ]


def _zipf(exponent: float) -> Floats:
    """load_LE: 1 / rank**exponent, the ranks of each layer in an order of their own."""
    ranked = 1.0 / np.arange(1, EXPERTS + 1) ** exponent
    return np.random.default_rng(1).permuted(np.tile(ranked, (LAYERS, 1)), axis=1)


def _hot(count: int, share: float) -> Floats:
    """load_LE: the hot experts get this share of all together, evenly; the others about the same each."""
    rng = np.random.default_rng(2)
    rest = rng.uniform(0.5, 1.5, (LAYERS, EXPERTS - count))
    rest *= (1.0 - share) / rest.sum(axis=1, keepdims=True)
    return rng.permuted(np.concatenate([np.full((LAYERS, count), share / count), rest], axis=1), axis=1)


def _noisy(load_LE: Floats, windows: int, rng: np.random.Generator) -> Floats:
    """load_WLE: each expert 20 % more or less in each window."""
    return load_LE * rng.lognormal(0.0, 0.2, (windows, *load_LE.shape))


def _steady(name: str, load_LE: Floats, num_shards: int) -> Trace:
    rng = np.random.default_rng(3)
    planned, met = _noisy(load_LE, WINDOWS, rng), _noisy(load_LE, WINDOWS, rng)
    return Trace(name, num_shards, MAVERICK_BYTES, planned[None], met[None])


def _drifting(name: str, load_LE: Floats, num_shards: int, periods: int = 8) -> Trace:
    """Between two periods every expert's load changes by a factor of 1.3 or so, and two of each layer change places."""
    rng, planned, met = np.random.default_rng(4), [], []
    for _ in range(periods):
        planned.append(_noisy(load_LE, WINDOWS, rng))
        met.append(_noisy(load_LE, WINDOWS, rng))
        load_LE = load_LE * rng.lognormal(0.0, 0.25, load_LE.shape)
        hottest_L, others_L = load_LE.argmax(axis=1), rng.integers(EXPERTS, size=LAYERS)
        for load_E, hottest, other in zip(load_LE, hottest_L, others_L, strict=True):
            load_E[[hottest, other]] = load_E[[other, hottest]]
    return Trace(name, num_shards, MAVERICK_BYTES, np.array(planned), np.array(met))


def _recorded() -> list[Trace]:
    """What the embedded model's routers chose on text that it was not trained on (demo/trace.py).

    Once all kinds of text in turn, so that both halves of the tokens are alike, and once kind after kind.
    """
    with np.load(RECORDED, allow_pickle=False) as stored:
        experts_TL, kind_T = stored["experts_TL"].astype(np.int64), stored["kind_T"]
    by_kind = [_counts(experts_TL[kind_T == kind], 32) for kind in range(int(kind_T.max()) + 1)]
    mixed_WLE = np.sum(by_kind, axis=0)
    kinds_PWLE = np.array(by_kind)
    return [
        Trace("recorded, kinds mixed", 4, DEMO_BYTES, mixed_WLE[None, 0::2], mixed_WLE[None, 1::2]),
        Trace("recorded, kind after kind", 4, DEMO_BYTES, kinds_PWLE[:, 0::2], kinds_PWLE[:, 1::2]),
    ]


def _counts(experts_TL: npt.NDArray[np.int64], windows: int, num_experts: int = EXPERTS) -> Floats:
    """tokens_WLE: of each expert in each of so many equal parts."""
    parts = np.array_split(experts_TL, windows)
    return np.array([[np.bincount(part_T, minlength=num_experts) for part_T in part.T] for part in parts], np.float64)

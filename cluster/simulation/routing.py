"""Which experts the tokens of a step go to: recorded tokens, or random ones.

Legend: T tokens, L MoE layers, E experts, A experts per token.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from checkpoint.errors import DroverError, quoted
from cluster.simulation.scenario import DEMO_TRACE, HotSection, ModelSection, RoutingSection

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

FEW_TOKENS = 512
"""Drawing each token is faster below, drawing an expert's number of tokens above."""


class Routing(Protocol):
    """Where tokens go. One object serves all routers; each brings its own random numbers."""

    def counts(self, now_s: float, positions_T: Counts, rng: np.random.Generator) -> Counts:
        """rows_LE: how many of the tokens go to each expert. positions_T: see `first_position`."""
        ...

    def first_position(self, rng: np.random.Generator) -> int:
        """Where a request's first token is in the recorded text; 0 where nothing is recorded."""
        ...


def routing_of(section: RoutingSection, model: ModelSection, seed: int) -> Routing:
    """The routing that a scenario describes. Raises DroverError where the trace does not fit."""
    base: Routing
    if section.source == "trace":
        base = TraceRouting(read_trace(section.trace or DEMO_TRACE, section.kinds), model)
    else:
        exponent = section.exponent if section.source == "zipf" else 0.0
        base = ZipfRouting(model, exponent, section.drift_s, np.random.default_rng([seed, 0]))
    return HotRouting(base, section.hot, model) if section.hot else base


class ZipfRouting:
    """Random tokens. The expert of rank r has the weight 1 / r ** exponent; each layer has its own ranks.

    drift_s: after so long the weights have moved by one rank: what was hottest is second hottest.
    """

    def __init__(self, model: ModelSection, exponent: float, drift_s: float | None, rng: np.random.Generator) -> None:
        weights_E = 1.0 / np.arange(1, model.experts + 1) ** exponent
        rank_LE = np.array([rng.permutation(model.experts) for _ in range(model.moe_layers)], np.int64)
        self._rank_LE = rank_LE.reshape(model.moe_layers, model.experts)
        self._weights_E, self._per_token, self._drift_s = weights_E / weights_E.sum(), model.experts_per_token, drift_s
        self._shift, self._share_LE = 0, self._weights_E[self._rank_LE]

    def first_position(self, rng: np.random.Generator) -> int:
        return 0

    def counts(self, now_s: float, positions_T: Counts, rng: np.random.Generator) -> Counts:
        shift = int(now_s / self._drift_s) if self._drift_s else 0
        if shift != self._shift:
            self._shift = shift
            self._share_LE = self._weights_E[(self._rank_LE + shift) % len(self._weights_E)]
        return draw(self._share_LE, len(positions_T) * self._per_token, rng)


def draw(share_LE: Floats, rows: int, rng: np.random.Generator) -> Counts:
    """rows_LE: `rows` rows in every layer, each to an expert by the layer's shares.

    With several experts per token a token may draw one twice; of 128 experts that is rare.
    """
    layers, experts = share_LE.shape
    if not layers or rows >= FEW_TOKENS:
        return rng.multinomial(rows, share_LE).astype(np.int64).reshape(layers, experts)
    ends_LE = np.cumsum(share_LE, axis=1)
    ends_LE[:, -1] = 1.0
    ends = (ends_LE + np.arange(layers)[:, None]).ravel()
    drawn = rng.random((layers, rows)) + np.arange(layers)[:, None]
    found = np.minimum(np.searchsorted(ends, drawn.ravel(), side="right"), layers * experts - 1)
    return np.bincount(found, minlength=layers * experts).reshape(layers, experts)


class TraceRouting:
    """Recorded tokens: position p is token p of the trace, which begins again when it ends."""

    def __init__(self, experts_TL: Counts, model: ModelSection) -> None:
        layers, top = experts_TL.shape[1], int(experts_TL.max())
        if layers != model.moe_layers or top >= model.experts or model.experts_per_token != 1:
            raise DroverError(
                f"routing.trace has {layers} layers, experts up to {top} and 1 expert per token; "
                f"model has {model.moe_layers} moe_layers, {model.experts} experts and {model.experts_per_token} "
                "experts_per_token, set these"
            )
        # Flat indices: token t of layer l is in bin l * E + e.
        self._bins_TL = experts_TL.astype(np.int64) + np.arange(layers) * model.experts
        self._shape = (layers, model.experts)

    def first_position(self, rng: np.random.Generator) -> int:
        return int(rng.integers(len(self._bins_TL)))

    def counts(self, now_s: float, positions_T: Counts, rng: np.random.Generator) -> Counts:
        bins = self._bins_TL[positions_T % len(self._bins_TL)]
        return np.bincount(bins.ravel(), minlength=self._shape[0] * self._shape[1]).reshape(self._shape)


class HotRouting:
    """For some time each row of `base` goes to one of a few experts instead, with a probability.

    Their numbers follow each other, so that one shard of an even placement has them. Each layer
    begins elsewhere: in 4 layers of 128 experts, 4 hot ones are 0 to 3, 32 to 35, 64 to 67, 96 to 99.
    """

    def __init__(self, base: Routing, hot: Sequence[HotSection], model: ModelSection) -> None:
        self._base, self._hot = base, hot
        self._experts_of = [
            (np.arange(each.experts) + np.arange(model.moe_layers)[:, None] * model.experts // max(1, model.moe_layers))
            % model.experts
            for each in hot
        ]

    def first_position(self, rng: np.random.Generator) -> int:
        return self._base.first_position(rng)

    def counts(self, now_s: float, positions_T: Counts, rng: np.random.Generator) -> Counts:
        rows_LE = self._base.counts(now_s, positions_T, rng)
        for each, experts_LH in zip(self._hot, self._experts_of, strict=True):
            if each.from_s <= now_s < each.until_s and len(rows_LE):
                kept_LE = rng.binomial(rows_LE, 1.0 - each.share)
                taken_L = (rows_LE - kept_LE).sum(axis=1)
                even_H = np.full(experts_LH.shape[1], 1.0 / experts_LH.shape[1])
                np.add.at(kept_LE, (np.arange(len(kept_LE))[:, None], experts_LH), rng.multinomial(taken_L, even_H))
                rows_LE = kept_LE
        return rows_LE


def read_trace(path: Path, kinds: Sequence[str] = ()) -> Counts:
    """experts_TL of a recorded trace: of all its tokens, or of those of some kinds. Raises DroverError."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            experts_TL: Counts = stored["experts_TL"].astype(np.int64)
            known = [str(kind) for kind in stored["kinds"]] if "kinds" in stored else []
            kind_T = stored.get("kind_T")
    except FileNotFoundError:
        raise DroverError(f"routing.trace is {path}, which does not exist; `python -m demo.trace` makes one") from None
    except (OSError, ValueError, KeyError) as error:
        raise DroverError(
            f"routing.trace is {path}, no routing trace: {quoted(str(error))}; `python -m demo.trace` makes one"
        ) from None
    unknown = [kind for kind in kinds if kind not in known]
    if unknown:
        raise DroverError(f"routing.kinds has {quoted(unknown[0])}; {path} has {', '.join(known) or 'no kinds'}")
    if experts_TL.ndim != 2 or not experts_TL.size:
        raise DroverError(
            f"routing.trace is {path}, whose experts_TL has the shape {experts_TL.shape}; [tokens, layers]"
        )
    if kinds and kind_T is not None:
        experts_TL = experts_TL[np.isin(kind_T, [known.index(kind) for kind in kinds])]
    return experts_TL

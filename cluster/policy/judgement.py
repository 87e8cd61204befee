"""The rules of scaling: from numbers to a decision, for copies and for parts that are counted.

Windows are Knative's, names Ray Serve's. All that a decision rests on is in its inputs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

COPIES = "copies"
COUNTED = ("shards", "routers", "frontends")
KINDS = (COPIES, *COUNTED)
Inputs = Mapping[str, Any]
"""Numbers, truths and short texts; JSON keeps them as they are."""
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Limits:
    """How many there may be."""

    min: int
    max: int


@dataclass(frozen=True)
class ScaleSettings:
    """stable_window_s: decisions rest on the average load over it. panic_window_s: the same in a panic.

    A panic begins when the panic window's load is panic_threshold times the target; for copies, when its
    imbalance exceeds 1 by panic_threshold times what is tolerated. It ends once that was not so for
    stable_window_s. In a panic nothing becomes less, and what becomes more does so at once. Else the
    stable window must have asked for it for upscale_delay_s, or downscale_delay_s.
    target_load: busy share that each part is to have. upscaling_factor, downscaling_factor: the share of a
    wanted change that is made at once. cooldown_s: after a change, nothing of its kind changes.
    metrics_interval_s: between samples. look_back_period_s: older samples are stale, and hold everything.
    tolerated: the imbalance between shards at which copies stay as they are.
    dry_run: decide, and do nothing. paused: decide nothing.
    """

    paused: bool = False
    dry_run: bool = False
    metrics_interval_s: float = 2.0
    look_back_period_s: float = 30.0
    stable_window_s: float = 60.0
    panic_window_s: float = 6.0
    panic_threshold: float = 2.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    upscaling_factor: float = 1.0
    downscaling_factor: float = 1.0
    cooldown_s: float = 30.0
    target_load: float = 0.7
    tolerated: float = 1.1
    shards: Limits = Limits(1, 1)
    routers: Limits = Limits(1, 1)
    frontends: Limits = Limits(1, 1)

    def limits(self, kind: str) -> Limits:
        found: Limits = getattr(self, kind)
        return found


def settings_of(inputs: Inputs) -> ScaleSettings:
    """The settings that a decision was made with."""
    told = dict(inputs["settings"])
    return ScaleSettings(**told | {kind: Limits(**told[kind]) for kind in COUNTED})


def wanted_count(load: float, current: int, settings: ScaleSettings, limits: Limits) -> int:
    """How many parts bring the load of each to the target, within the limits.

    Example: 4 parts at load 0.9 with target 0.6 become 6, and 5 with an upscaling_factor of 0.5.

    >>> settings = ScaleSettings(target_load=0.6, downscaling_factor=0.5)
    >>> [wanted_count(load, 4, settings, Limits(1, 9)) for load in (0.9, 0.6, 0.3, 0.0, 2.0)]
    [6, 4, 3, 2, 9]
    """
    error = load / settings.target_load - 1.0
    factor = settings.upscaling_factor if error > 0 else settings.downscaling_factor
    asked = math.ceil(current * (1.0 + error * factor) - _ROUNDING)
    return min(max(asked, limits.min), limits.max)


def judge(kind: str, inputs: Inputs) -> tuple[str, int, str]:
    """(decision, target, reason) from these inputs alone."""
    return _judge_copies(inputs) if kind == COPIES else _judge_count(kind, inputs)


def in_panic(inputs: Inputs) -> bool:
    since_s = inputs["since_panic_s"]
    return since_s is not None and since_s < inputs["settings"]["stable_window_s"]


def _common_hold(inputs: Inputs, settings: ScaleSettings) -> str:
    """Why nothing of any kind may change now; empty if it may."""
    age_s = inputs["age_s"]
    if settings.paused:
        return "paused"
    if age_s is None:
        return "no load was measured yet"
    if age_s > settings.look_back_period_s:
        return f"the load was measured {age_s:.0f} s ago, which is more than {settings.look_back_period_s:g} s"
    if inputs["in_flight"]:
        return f"waits for {inputs['in_flight']}"
    if inputs["since_change_s"] is not None and inputs["since_change_s"] < settings.cooldown_s:
        return f"{inputs['since_change_s']:.0f} s after the last change; cooldown_s is {settings.cooldown_s:g}"
    return ""


def _judge_count(kind: str, inputs: Inputs) -> tuple[str, int, str]:
    settings, current = settings_of(inputs), inputs["current"]
    limits, why = settings.limits(kind), _common_hold(inputs, settings)
    if why:
        return "hold", current, why
    stable, panic, is_panic = inputs["load_stable"], inputs["load_panic"], in_panic(inputs)
    target = wanted_count(stable, current, settings, limits)
    if is_panic and panic is not None:
        target = max(target, wanted_count(panic, current, settings, limits), min(current, limits.max))
    facts = (
        f"load {stable:.2f} over {settings.stable_window_s:g} s"
        f"{'' if panic is None else f', {panic:.2f} over {settings.panic_window_s:g} s'}, "
        f"target {settings.target_load:g}, {limits.min} to {limits.max} {kind}"
    )
    if target == current:
        return "hold", current, facts
    step = f"{current} -> {target}: {facts}"
    if target > current:
        above_s = inputs["above_s"] or 0.0
        if is_panic or current < limits.min or above_s >= settings.upscale_delay_s:
            return "up", target, f"{'panic, ' if is_panic else ''}{step}"
        return "hold", current, f"{step}; for {above_s:.0f} s of upscale_delay_s {settings.upscale_delay_s:g}"
    below_s = inputs["below_s"] or 0.0
    if current > limits.max:
        return "down", target, step
    if inputs["covered_s"] < settings.stable_window_s:
        return "hold", current, f"{step}; the stable window is {inputs['covered_s']:.0f} s old"
    if below_s < settings.downscale_delay_s:
        return "hold", current, f"{step}; for {below_s:.0f} s of downscale_delay_s {settings.downscale_delay_s:g}"
    return "down", target, step


def holds_copies(inputs: Inputs) -> str:
    """Why copies stay as they are, whatever might be proposed; empty if a proposal is to be made."""
    settings = settings_of(inputs)
    why = _common_hold(inputs, settings)
    if why or inputs["imbalance_stable"] is None:
        return why or "no load was measured yet"
    if in_panic(inputs):
        return "" if inputs["imbalance_panic"] is not None else "panic, and nothing is computed"
    stable, above_s, below_s = inputs["imbalance_stable"], inputs["above_s"], inputs["below_s"]
    if above_s is not None:
        if above_s >= settings.upscale_delay_s:
            return ""
        return f"imbalance {stable:.2f} for {above_s:.0f} s of upscale_delay_s {settings.upscale_delay_s:g}"
    if not inputs["extra_copies"]:
        return f"imbalance {stable:.2f} of {settings.tolerated:g} that are tolerated, no copies to give back"
    if inputs["covered_s"] >= settings.stable_window_s and (below_s or 0.0) >= settings.downscale_delay_s:
        return ""
    return f"imbalance {stable:.2f}; for {below_s or 0.0:.0f} s of downscale_delay_s {settings.downscale_delay_s:g}"


def _judge_copies(inputs: Inputs) -> tuple[str, int, str]:
    extra, why, proposal = inputs["extra_copies"], holds_copies(inputs), inputs["proposal"]
    if why:
        return "hold", extra, why
    if proposal is None:
        return "hold", extra, f"imbalance {inputs['imbalance_stable']:.2f}; what was proposed lately was declined"
    target, is_panic = extra + proposal["copies_after"] - proposal["copies_before"], in_panic(inputs)
    if not proposal["is_accepted"]:
        return "hold", extra, proposal["reason"]
    if not proposal["only_sheds"]:
        return "rebalance", target, f"{'panic, ' if is_panic else ''}{proposal['reason']}"
    if is_panic or inputs["above_s"] is not None:
        return "hold", extra, f"nothing is given back while load rises; {proposal['reason']}"
    return "shed", target, proposal["reason"]

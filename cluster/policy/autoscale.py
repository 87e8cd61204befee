"""When copies, shards, routers and frontends become more or fewer.

A `Scaler` keeps what has to be remembered: samples, and since when something has been so. What it
makes of that is `judge`, a pure function of plain numbers. They are kept with each decision, so that
any decision can be made again from its row alone. Whoever samples gives the time, in real seconds.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from cluster.policy.balance import Proposal
from cluster.policy.judgement import COPIES, KINDS, Inputs, ScaleSettings, holds_copies, in_panic, judge, wanted_count


@dataclass(frozen=True)
class Signals:
    """What is so now. counts: parts of each kind that are wanted. loads: their mean busy share; None: unknown.

    imbalance_stable, imbalance_panic: of the present placement, under the load of each window; None: unknown.
    load_age_s: of the newest window of expert loads. extra_copies: beyond the replicas, over all layers.
    in_flight: the change that is under way; empty if there is none.
    propose: (window, horizon), both in seconds, to a placement for the load of that window.
    """

    counts: Mapping[str, int]
    loads: Mapping[str, float | None]
    imbalance_stable: float | None = None
    imbalance_panic: float | None = None
    load_age_s: float | None = None
    extra_copies: int = 0
    in_flight: str = ""
    propose: Callable[[float, float], Proposal] | None = None


@dataclass(frozen=True)
class Decision:
    """decision: "hold", "up", "down"; of copies "hold", "rebalance", "shed". target: how many there are to be.

    inputs: all that it rests on. proposal: the placement to change to, if it is about copies.
    """

    time_s: float
    kind: str
    decision: str
    target: int
    reason: str
    inputs: Inputs
    proposal: Proposal | None = field(default=None, compare=False)

    @property
    def acts(self) -> bool:
        """Whether something is to be done."""
        return self.decision != "hold" and not self.inputs["settings"]["dry_run"]


@dataclass
class _Memory:
    """Of one kind. Times are None while it is not so."""

    samples: deque[tuple[float, float]] = field(default_factory=deque)
    above_since_s: float | None = None
    below_since_s: float | None = None
    panicked_s: float | None = None
    changed_s: float | None = None
    declined_s: float | None = None


class Scaler:
    """Decides on every sample; one thread. Begun anew, it holds until its windows are full again."""

    def __init__(self, settings: ScaleSettings, horizon_s: float = 300.0) -> None:
        """horizon_s: for how long a placement is expected to be right; in a panic, for a stable window."""
        self.settings, self._horizon_s = settings, horizon_s
        self._memory = {kind: _Memory() for kind in KINDS}
        self._began_s: float | None = None

    def decide(self, now_s: float, signals: Signals) -> tuple[Decision, ...]:
        """One decision of each kind, of which at most one acts: one change at a time."""
        if self._began_s is None:
            self._began_s = now_s
        in_flight, decisions = signals.in_flight, []
        for kind in KINDS:
            if kind == COPIES:
                decision = self._copies(now_s, signals, in_flight)
            else:
                decision = self._count(now_s, kind, signals, in_flight)
            if decision.acts:
                self._memory[kind].changed_s = now_s
                in_flight = f"{kind}: {decision.decision}"
            decisions.append(decision)
        return tuple(decisions)

    def _common(self, now_s: float, memory: _Memory, in_flight: str, measured_s: float) -> dict[str, Any]:
        """measured_s: when the load was last measured. Until then it was so, if it was."""

        def since(time_s: float | None) -> float | None:
            return None if time_s is None else now_s - time_s

        return {
            "settings": asdict(self.settings),
            "in_flight": in_flight,
            "covered_s": now_s - (now_s if self._began_s is None else self._began_s),
            "since_panic_s": since(memory.panicked_s),
            "above_s": None if memory.above_since_s is None else measured_s - memory.above_since_s,
            "below_s": None if memory.below_since_s is None else measured_s - memory.below_since_s,
            "since_change_s": since(memory.changed_s),
        }

    def _count(self, now_s: float, kind: str, signals: Signals, in_flight: str) -> Decision:
        settings, memory = self.settings, self._memory[kind]
        load, current, limits = signals.loads.get(kind), signals.counts[kind], settings.limits(kind)
        if load is not None:
            memory.samples.append((now_s, load))
        while memory.samples and memory.samples[0][0] <= now_s - settings.stable_window_s:
            memory.samples.popleft()
        stable = _mean([load for _, load in memory.samples])
        panic = _mean([load for time_s, load in memory.samples if time_s > now_s - settings.panic_window_s])
        if stable is not None:
            asked = wanted_count(stable, current, settings, limits)
            memory.above_since_s = _since(memory.above_since_s, now_s, asked > current)
            memory.below_since_s = _since(memory.below_since_s, now_s, asked < current)
        if panic is not None and panic >= settings.panic_threshold * settings.target_load:
            memory.panicked_s = now_s
        measured_s = memory.samples[-1][0] if memory.samples else now_s
        age_s = now_s - measured_s if memory.samples else None
        own = {"current": current, "load_stable": stable, "load_panic": panic, "age_s": age_s}
        return _decided(now_s, kind, self._common(now_s, memory, in_flight, measured_s) | own)

    def _copies(self, now_s: float, signals: Signals, in_flight: str) -> Decision:
        settings, memory = self.settings, self._memory[COPIES]
        stable, panic = signals.imbalance_stable, signals.imbalance_panic
        if stable is not None:
            is_above = stable > settings.tolerated
            memory.above_since_s = _since(memory.above_since_s, now_s, is_above)
            memory.below_since_s = _since(memory.below_since_s, now_s, not is_above)
            # An imbalance that has lasted is no reason to panic.
            tolerated = max(settings.tolerated, stable) - 1.0
            if panic is not None and panic - 1.0 >= settings.panic_threshold * tolerated:
                memory.panicked_s = now_s
        own = {
            "extra_copies": signals.extra_copies,
            "imbalance_stable": stable,
            "imbalance_panic": panic,
            "age_s": signals.load_age_s,
            "proposal": None,
        }
        inputs = self._common(now_s, memory, in_flight, now_s - (signals.load_age_s or 0.0)) | own
        asks_again = memory.declined_s is None or now_s - memory.declined_s >= settings.panic_window_s
        if holds_copies(inputs) or signals.propose is None or not asks_again:
            return _decided(now_s, COPIES, inputs)
        if in_panic(inputs):
            proposal = signals.propose(settings.panic_window_s, settings.stable_window_s)
        else:
            proposal = signals.propose(settings.stable_window_s, self._horizon_s)
        decision = _decided(now_s, COPIES, inputs | {"proposal": _numbers(proposal)}, proposal)
        memory.declined_s = now_s if decision.decision == "hold" else None
        return decision


def _numbers(proposal: Proposal) -> Inputs:
    """What a decision rests on of a proposal. The placement itself is in the change that follows."""
    kept = ("imbalance_before", "imbalance_after", "moved_bytes", "gain", "gain_tok_s", "copies_before", "copies_after")
    numbers = {name: getattr(proposal, name) for name in kept}
    return numbers | {
        "is_accepted": proposal.is_accepted, "only_sheds": proposal.only_sheds, "reason": proposal.reason
    }  # fmt: skip


def _decided(now_s: float, kind: str, inputs: Inputs, proposal: Proposal | None = None) -> Decision:
    decision, target, reason = judge(kind, inputs)
    return Decision(now_s, kind, decision, target, reason, inputs, proposal)


def _since(began_s: float | None, now_s: float, is_so: bool) -> float | None:
    """Since when something is so; None if it is not."""
    if not is_so:
        return None
    return now_s if began_s is None else began_s


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None

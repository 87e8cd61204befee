"""Measures the load of a deployment, and has experts moved and parts started or ended where it pays."""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import ray

from cluster.actors.desired import Desired, View
from cluster.actors.placement_keeper import PlacementKeeper
from cluster.actors.resizing import Resizing
from cluster.events import EventLog
from cluster.part_names import part_number
from cluster.policy.autoscale import Decision, Scaler
from cluster.policy.balance import BalanceSettings, ShardRoom, propose
from cluster.policy.decisions import DecisionLog, to_line
from cluster.policy.judgement import COPIES, ScaleSettings
from cluster.policy.load import LoadWindow
from cluster.policy.signals import signals_of
from cluster.policy.wanted import Resize, Wanted
from cluster.reports import LoadView, RebalanceReport, RouterLoad, ShardStats
from cluster.running import Running
from cluster.stored_autoscaling import read_is_paused, write_is_paused
from experts.placement import Placement

logger = logging.getLogger(__name__)

ANSWER_S = 2.0
"""For all parts together; who does not answer is measured with the next sample."""
FRONTEND_STREAMS = 1024
"""Requests that Serve gives to one replica at once; a frontend with as many is fully busy."""
MOST_MOVES = 200
"""Changes of a rebalancing that are told in words."""


@dataclass(frozen=True)
class ScalingSpec:
    """load_bytes_per_s: how fast a shard reads experts. expert_bytes: of one. slots: of each shard and MoE layer."""

    settings: ScaleSettings
    load_bytes_per_s: float
    expert_bytes: int
    slots: int


class Autoscaler:
    """A thread samples and decides; the other methods are for any thread."""

    def __init__(
        self,
        namespace: str,
        spec: ScalingSpec,
        desired: Desired,
        running: Running,
        placements: PlacementKeeper,
        resizing: Resizing,
        events: EventLog,
        view: Callable[[], View],
    ) -> None:
        """view: what the controller found when it last looked."""
        self._namespace, self._spec, self._desired, self._running = namespace, spec, desired, running
        self._placements, self._resizing, self._events, self._view = placements, resizing, events, view
        stored = read_is_paused(namespace)
        is_paused = spec.settings.paused if stored is None else stored
        self._scaler = Scaler(replace(spec.settings, paused=is_paused))
        by_expert = desired.wanted.placement.shards_of
        self._window = LoadWindow(tuple(by_expert), max((len(experts) for experts in by_expert.values()), default=0))
        self._busy = _BusyShares()
        self._log = DecisionLog()
        self._lock = threading.Lock()  # of the window, which is read while it grows
        self._wake = threading.Event()
        threading.Thread(target=self._run, name="autoscale", daemon=True).start()

    @property
    def mode(self) -> str:
        """ "on", "paused" or "dry run"."""
        settings = self._scaler.settings
        return "paused" if settings.paused else "dry run" if settings.dry_run else "on"

    def pause(self, is_paused: bool) -> str:
        """Decide nothing from now on, or again, also after a restart of the controller; returns an empty string."""
        write_is_paused(self._namespace, is_paused)
        self._scaler.settings = replace(self._scaler.settings, paused=is_paused)
        self._events.add("decision", "autoscaling", "paused" if is_paused else "resumed")
        return ""

    def load(self) -> LoadView:
        """The load of each expert over the stable window, and on how many shards it is."""
        now_s, placement = time.monotonic(), self._placements.state.current
        with self._lock:
            age_s = self._window.age_s(now_s)
            loads = self._window.loads(now_s, self._scaler.settings.stable_window_s)
        mean_LE = {} if loads is None else dict(zip(loads.layers, loads.mean_LE.round(3).tolist(), strict=True))
        copies = {layer: [len(shards) for shards in experts] for layer, experts in placement.shards_of.items()}
        return LoadView(age_s, mean_LE, copies)

    def decisions(self) -> list[str]:
        """The newest decisions, the oldest first: a line of JSON each, which `cluster.policy.decisions` reads."""
        return [to_line(decision) for decision in self._log.rows()]

    def rebalance(self, operation_id: str, is_dry_run: bool) -> RebalanceReport:
        """Place experts anew by the load of the stable window, if that is worth it; or tell what that would do."""
        running, view = self._placements.operation(), self._view()
        if running is not None and running.operation_id == operation_id:
            return RebalanceReport(operation_id=operation_id, is_accepted=True, reason="it is under way")
        if not is_dry_run and (obstacle := self._obstacle(view)):
            return RebalanceReport(f"experts stay where they are because of {obstacle}; try again once that is over")
        settings, now_s = self._scaler.settings, time.monotonic()
        with self._lock:
            loads = self._window.loads(now_s, settings.stable_window_s)
        if loads is None:
            return RebalanceReport(
                f"no load was measured in the last {settings.stable_window_s:g} s; send requests, and try again"
            )
        placement = self._placements.state.current
        proposal = propose(loads, placement, self._rooms(view), self._balance(view.wanted))
        refusal = ""
        if proposal.is_accepted and not is_dry_run:
            refusal = self._placements.change(operation_id, proposal.placement, "rebalance")
        return RebalanceReport(
            refusal,
            operation_id if proposal.is_accepted and not is_dry_run and not refusal else "",
            proposal.imbalance_before,
            proposal.imbalance_after,
            proposal.moved_bytes,
            proposal.gain_tok_s,
            proposal.is_accepted,
            proposal.reason,
            moves(placement, proposal.placement),
        )

    def _run(self) -> None:
        while True:
            began_s = time.monotonic()
            try:
                self._sample_and_act()
            except Exception:
                logger.exception("scaling failed")
            left_s = self._scaler.settings.metrics_interval_s - (time.monotonic() - began_s)
            self._wake.wait(max(left_s, 0.0))

    def _sample_and_act(self) -> None:
        view = self._view()
        wanted = view.wanted
        loads = self._answers(wanted.routers, "load", RouterLoad)
        shards = self._answers(wanted.shards, "stats", ShardStats)
        now_s = time.monotonic()
        with self._lock:
            self._window.add(now_s, {name: load.totals for name, load in loads.items()})
            busy = self._busy.shares(now_s, loads, shards, wanted.frontends)
            signals = signals_of(
                self._window,
                now_s,
                self._scaler.settings,
                self._balance(wanted),
                self._placements.state.current,
                self._rooms(view),
                {"shards": len(wanted.shards), "routers": len(wanted.routers), "frontends": wanted.frontends},
                busy,
                self._obstacle(view),
            )
        decisions = self._scaler.decide(now_s, signals)
        for decision in self._log.add(decisions):
            if decision.decision != "hold":
                self._events.add(
                    "decision", decision.kind, f"{decision.decision}: {decision.reason}",
                    decision=decision.decision, target=decision.target, inputs=decision.inputs,
                )  # fmt: skip
        for decision in decisions:
            if decision.acts:
                self._act(decision)

    def _act(self, decision: Decision) -> None:
        operation_id = f"{decision.kind}-{time.time_ns() // 10**6}"
        if decision.kind == COPIES:
            assert decision.proposal is not None
            refusal = self._placements.change(operation_id, decision.proposal.placement, decision.decision)
        else:
            counts: dict[str, Any] = {decision.kind: decision.target}
            refusal = self._resizing.begin(Resize(operation_id, **counts))
        if refusal:
            self._events.add("decision", decision.kind, f"refused: {refusal}")

    def _obstacle(self, view: View) -> str:
        """What is under way, so that nothing else may begin; empty if nothing is."""
        wanted, state = view.wanted, self._placements.state
        if (running := self._resizing.status(view)) is not None or (
            running := self._placements.operation()
        ) is not None:
            return f"operation {running.operation_id} ({running.kind})"
        if not state.is_settled:
            return f"placement {state.current.epoch}, which not all routers follow yet"
        if leaves := [*wanted.drained, *wanted.released]:
            return f"the drain of {leaves[0]}"
        if wanted.cleared:
            return f"the drain of node {next(iter(wanted.cleared))}"
        away = [name for name in wanted.shards if name not in view.found or not view.found[name].is_ready]
        return f"{away[0]}, which is not ready" if away else ""

    def _rooms(self, view: View) -> list[ShardRoom]:
        """The shards that stay; those without a node are on one of their own."""
        return [
            ShardRoom(part_number(name), (found.node if found else None) or name, self._spec.slots)
            for name in view.wanted.shards
            if name not in view.wanted.released
            for found in [view.found.get(name)]
        ]

    def _balance(self, wanted: Wanted) -> BalanceSettings:
        spec = self._spec
        return BalanceSettings(
            replicas=wanted.replicas,
            expert_bytes=max(spec.expert_bytes, 1),
            bandwidth_bytes_s=spec.load_bytes_per_s if math.isfinite(spec.load_bytes_per_s) else 1e12,
            threshold=spec.settings.tolerated,
        )

    def _answers(self, names: Sequence[str], method: str, kind: type["_Answer"]) -> dict[str, "_Answer"]:
        """What the parts answer that do so in time."""
        calls = {}
        for name in names:
            try:
                calls[getattr(self._running.actor(name), method).remote()] = name
            except ValueError:
                continue  # it does not exist now
        if not calls:
            return {}
        ready, late = ray.wait(list(calls), num_returns=len(calls), timeout=ANSWER_S)
        for answer in late:
            ray.cancel(answer)
        found: dict[str, _Answer] = {}
        for answer in ready:
            try:
                value: Any = ray.get(answer)
            except ray.exceptions.RayError:
                continue  # it has just died
            assert isinstance(value, kind)
            found[calls[answer]] = value
        return found


_Answer = TypeVar("_Answer")


class _BusyShares:
    """From what parts answer to the mean busy share of each kind."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, float]] = {}

    def shares(
        self, now_s: float, loads: Mapping[str, RouterLoad], shards: Mapping[str, ShardStats], frontends: int
    ) -> dict[str, float | None]:
        """None where nothing is known. A shard's is that of the time since its last answer."""
        of_shards = []
        for name, stats in shards.items():
            then_s, busy_s = self._last.get(name, (now_s, stats.busy_s))
            if now_s > then_s and stats.busy_s >= busy_s:  # else it was started again
                of_shards.append((stats.busy_s - busy_s) / (now_s - then_s))
            self._last[name] = now_s, stats.busy_s
        streams = sum(load.open_requests for load in loads.values())
        return {
            "shards": _mean(of_shards),
            "routers": _mean([load.busy for load in loads.values()]),
            "frontends": streams / (max(frontends, 1) * FRONTEND_STREAMS) if loads else None,
        }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def moves(now: Placement, then: Placement) -> tuple[str, ...]:
    """What changes, in words. Example: "layer 1, expert 7: shards 0 -> 0, 2"."""
    told = []
    for layer, by_expert in then.shards_of.items():
        for expert, (before, after) in enumerate(zip(now.shards_of[layer], by_expert, strict=True)):
            if {*before} != {*after}:
                told.append(f"layer {layer}, expert {expert}: shards {_listed(before)} -> {_listed(after)}")
    more = len(told) - MOST_MOVES
    return (*told[:MOST_MOVES], f"and {more} more") if more > 0 else tuple(told)


def _listed(shards: tuple[int, ...]) -> str:
    return ", ".join(map(str, sorted(shards)))

"""The loop of the fault bench: well, a fault, its end, well again; and then whether every token was right."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.chaos.asks import Ask
from bench.chaos.counters import Watch
from bench.chaos.faults import Injected, Injector
from bench.chaos.load_process import LoadProcess
from bench.chaos.processes import lives
from bench.chaos.records import Stream
from bench.chaos.results import MAY_BREAK, Happened, ModeRun, rate_before, windows_end
from bench.chaos.schedule import Fault
from bench.chaos.system import System
from bench.errors import BenchError

FEWEST_ACTIVE = 8
WELL_S = 180.0
"""How long the deployment may take to be well again; then the bench goes on, and the row says so."""
FLOWING_S = 0.6
"""A stream whose last token is older stands still."""
MOST_ACTIVE = 24
CHANGE, CHANGE_S = 1.3, 5.0
"""If fewer or more streams are active for so long, the rate is changed by this factor."""
LOOK_S = 0.1
RESUMED = "the client resumed"
RESTARTED_BY = {
    "router": "Ray restarted a router",
    "shard": "Ray restarted a shard",
    "controller": "Ray restarted the controller",
    "frontend": "Ray Serve started a replica",
    "haproxy": "HAProxy was started again",
}

Say = Callable[[str], None]
Judge = Callable[[Sequence[Stream]], Mapping[int, tuple[float, int]]]
"""From streams to those with wrong tokens: when the first came, and how many."""


@dataclass(frozen=True)
class Pace:
    """rate_per_s: of requests. quiet_s: before the first fault, to measure the speed. settle_s: after each fault."""

    rate_per_s: float
    quiet_s: float = 15.0
    settle_s: float = 3.0


class Run:
    """One mode on one system. on_fault: called after each fault, for progress."""

    def __init__(
        self,
        system: System,
        injector: Injector,
        pace: Pace,
        say: Say,
        on_fault: Callable[[Happened], None] = lambda fault: None,
    ) -> None:
        self._system, self._injector, self._pace = system, injector, pace
        self._say, self._on_fault = say, on_fault
        self.rate_per_s = pace.rate_per_s
        """Raised where too few streams were active, because the machine turned out to be faster."""
        self._last: Happened | None = None
        self.skipped: list[tuple[str, str, str]] = []
        """(mode, target, why) of faults that could not come."""

    def mode(self, faults: Sequence[Fault], asks: Sequence[Ask], judge: Judge, work: Path) -> ModeRun:
        """All faults of a mode beside one load, then the load's end, and the check. Raises BenchError."""
        load = LoadProcess(self._system.address, asks, self.rate_per_s, work)
        try:
            watch = Watch(self._system.metrics_url)
            try:
                quiet_s = self._wait_until_steady(load, watch)
                self._pause(load, self._pace.quiet_s)
                ready_s = time.monotonic()
                happened = []
                for fault in faults:
                    done = self._fault(fault, load, watch)
                    if done is not None:
                        happened.append(done)
                        self._on_fault(done)
                end_s = time.monotonic()
            finally:
                watch.close()
            streams = load.finish()
        finally:
            load.close()
        windows_end(happened, end_s)
        return ModeRun(happened, streams, rate_before(streams, quiet_s, ready_s), judge(streams))

    def _fault(self, fault: Fault, load: LoadProcess, watch: Watch) -> Happened | None:
        self._wait_until_steady(load, watch)
        self._pause(load, fault.delay_s)
        active, before = load.state.active, self._system.everything()
        rises = watch.rises() | {RESUMED: float(load.state.resumed)}
        injected: list[Injected] = []
        try:
            try:
                for part in fault.parts:
                    injected.append(self._injector.inject(part))
            except BenchError as error:
                if (fault.mode, fault.target, str(error)) not in self.skipped:
                    self._say(f"  {fault.mode} of {fault.target} left out: {error}")
                    self.skipped.append((fault.mode, fault.target, str(error)))
                if not injected:
                    return None
            if fault.hold_s is not None:
                self._pause(load, fault.hold_s - (time.monotonic() - injected[0].at_s))
        finally:
            healed = [one.heal() for one in injected]
        done = Happened(
            fault.mode,
            fault.target,
            " + ".join(dict.fromkeys(one.point for one in injected)),
            [victim for one in injected for victim in one.victims],
            min(one.at_s for one in injected),
            active,
            healed_s=time.monotonic() if fault.hold_s is not None else None,
            uncovered=sum(one.uncovered for one in injected),
            note="; ".join(dict.fromkeys(one.note for one in injected if one.note)),
        )
        self._last = done
        self._wait_until_recovered(done, injected, before, load, watch)
        done.harm = {name: amount for one in healed for name, amount in one.items() if amount}
        risen = watch.rises() | ({RESUMED: float(load.state.resumed)} if fault.target in MAY_BREAK else {})
        done.evidence = self._risen(rises, risen) | self._restarted(before)
        self._pause(load, self._pace.settle_s)
        return done

    def _wait_until_recovered(
        self,
        done: Happened,
        injected: Sequence[Injected],
        before: Mapping[str, list[int]],
        load: LoadProcess,
        watch: Watch,
    ) -> None:
        """Until nothing that died is missing, every part is up in metrics read since, and every stream moves."""
        since_s = time.monotonic()
        gone = [pid for one in injected for pid in one.gone]
        while time.monotonic() < since_s + WELL_S:
            load.check()
            if self._system.restart_if_ended():
                done.restarted, done.note = True, "the whole deployment ended; the bench started it again"
            now = self._system.everything()
            is_complete = all(
                # HAProxy's processes before a reload stay until their connections end.
                len(now.get(name, [])) >= (1 if name == "haproxy" else len(pids))
                for name, pids in before.items()
                if name in watch.parts or not name.startswith(("router-", "shard-"))  # else it is not wanted any more
            )
            is_moving = load.state.stalled_s < FLOWING_S and load.state.active > 0 and load.state.at_s > since_s
            if is_complete and is_moving and watch.well_s > since_s and not any(map(lives, gone)):
                done.recovered_s = time.monotonic()
                return
            time.sleep(LOOK_S)  # nothing tells when a deployment is well
        alive = [f"process {pid} was to be dead" for pid in gone if lives(pid)]
        why = ", ".join([*alive, *watch.unwell]) or "streams stand still, or a part is missing"
        done.note = f"not well after {WELL_S:.0f} s: {why}"

    def _wait_until_steady(self, load: LoadProcess, watch: Watch) -> float:
        """Until enough streams run and every part is up; returns when. Raises BenchError."""
        deadline_s = time.monotonic() + WELL_S
        raise_s = time.monotonic() + CHANGE_S
        while time.monotonic() < deadline_s:
            load.check()
            if self._system.restart_if_ended() and self._last is not None:
                self._last.restarted, self._last.note = True, "the whole deployment ended afterwards"
            state, now_s = load.state, time.monotonic()
            if state.active >= FEWEST_ACTIVE and state.stalled_s < FLOWING_S and watch.well_s > now_s - 2.0:
                return now_s
            if now_s > raise_s and not watch.unwell and not FEWEST_ACTIVE <= state.active <= MOST_ACTIVE:
                is_few = state.active < FEWEST_ACTIVE
                self.rate_per_s *= CHANGE if is_few else 1 / CHANGE
                raise_s = now_s + CHANGE_S
                load.set_rate(self.rate_per_s)
                self._say(
                    f"  {state.active} streams are too {'few' if is_few else 'many'}: "
                    f"{self.rate_per_s:.2f} requests/s from now on"
                )
            time.sleep(LOOK_S)  # nothing tells when a deployment is well
        raise BenchError(
            f"not steady within {WELL_S:.0f} s: {load.state.active} active streams of {FEWEST_ACTIVE}, "
            f"{', '.join(watch.unwell) or 'every part is up'}; a higher --rate has more streams active"
        )

    def _pause(self, load: LoadProcess, seconds: float) -> None:
        """Part of the measurement: time in which streams run."""
        time.sleep(max(0.0, seconds))  # the interval that is measured
        load.check()

    def _restarted(self, before: Mapping[str, list[int]]) -> dict[str, float]:
        """Parts that run as other processes than before, by who does that."""
        found: dict[str, float] = {}
        for name, pids in self._system.everything().items():
            new = set(pids) - set(before.get(name, []))
            by = RESTARTED_BY.get(name.split("-")[0])  # what the bench starts again shows nothing
            if by and new and before.get(name):
                found[by] = found.get(by, 0.0) + len(new)
        return found

    @staticmethod
    def _risen(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
        return {name: value - before.get(name, 0.0) for name, value in after.items() if value > before.get(name, 0.0)}
